"""The embedded world: drawn by counter, never downloaded, known to the pixel.

world      what exists, its names and frequencies, who may see it
draws      random numbers by counter
outlines   shapes as formulas; scenes: what stands where; relations: how things stand to each other
render     pixels; words: captions with spans; questions; truth: boxes and masks as JSON
sets       splits and small sets; digits; sample: one sample of a split
source     the source of rows; gallery: pages to look at
"""
