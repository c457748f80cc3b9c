"""The embedded world: images drawn from a counter-based generator, with exact boxes, masks and captions.

world      the vocabulary: names, frequencies, and which splits show what
draws      counter-based random numbers
outlines   shapes as formulas; scenes: object placement; relations: spatial relations between two objects
render     pixels; words: captions with phrase spans; questions; truth: boxes and masks as JSON
sets       splits and small test sets; digits; sample: one sample of a split
motion     moving scenes; film: their videos; story: their captions; filmed: one sample with a video
source     the source of rows; gallery: pages for inspection
"""
