"""Word lists of the extractor ``rules``: function words, and corrections of the lexicon for captions.

The lexicon has the most frequent tag of a word in news text. There "key" is an adjective and "photograph" a verb.
"""

from collections.abc import Mapping

from pipeline.stages.annotate.noun_phrases import BREAK, QUANTIFIER

_FUNCTION_WORDS = {
    "DT": """
        a an the this that these those each every either neither any no both all another such last next
    """,
    "PRP$": "my your his her its our their whose thy",
    "PRP": """
        i you he she it we they me him us them mine yours hers ours theirs myself yourself himself herself
        itself ourselves yourselves themselves someone somebody something anyone anybody anything everyone
        everybody everything nobody nothing none u ya
    """,
    "WP": "who whom what which whoever whatever whichever",
    "WRB": "how when where why whenever wherever",
    QUANTIFIER: "some several many few various numerous countless multiple",
    "CD": """
        zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
        seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand
        million billion dozen
    """,
    "CC": "and or nor &",
    "IN": """
        of in on at by for from with without within into onto inside outside over under above below beneath
        underneath past behind beside besides between beyond near across through throughout against along alongside
        among amongst amid around about after before during until till since despite except like unlike upon
        toward towards via per versus vs than because although though while whilst if unless whether as off but
    """,
    "TO": "to",
    "EX": "there",
    "MD": "can could may might must shall should will would cannot wanna gonna gotta",
    "AUX": """
        am is are was were be been being isn aren wasn weren has have had having hasn haven hadn do does did don
        doesn didn won wouldn couldn shouldn
    """,
    "RB": "very too quite rather really so more most less least extremely super",
    "ADV": """
        not also just only even still never always often sometimes now then here again ever already almost away
        back together apart else maybe perhaps once twice soon later ago today tomorrow yesterday tonight
        indoors outdoors forward backward abroad instead however partly far enough yet sorry
    """,
    "RP": "up down out",
    "UH": "yes oh wow hey hi hello please thanks ok okay lol omg hooray yay congrats congratulations",
    BREAK: "etc am pm http https www com jpg jpeg png gif pdf",
}

_CORRECTIONS = {
    "NN": """
        photo photograph photography key watch design stock print desktop wallpaper vector clipart set logo icon
        text background backdrop silhouette snapshot screenshot selfie portrait close-up closeup macro t-shirt
        tee hoodie sweatshirt mug decal sticker phone iphone laptop gift style home picture image work plant
        present cut model cook guide shower cover sketch drawing painting building clothing ceiling wedding
        morning evening lightning ring wing king spring string thing swimming lighting parking housing crossing
        ride cap bow surf kiss hug dance sofa skate board snow plus salmon gold silver bronze copper pearl
        turquoise lavender teal chalkboard left right bottom middle north south east west seed bed weed reed
        shed speed breed light park school street sleeve club clip blanket collage crossword negative bloom
        wedge strip cross block deal sale team station square sink slide blossom sickle
    """,
    "NNS": """
        cows sheep people jeans leggings sunglasses glasses earrings graphics pictures photos images prints
        stocks designs plants tracks cuts offers watches sketches portraits rides parts bricks boards leaves
    """,
    "JJ": """
        checkered checked stripy inky snowy leafy hazy rainy grainy spotted dotted striped plaid floral vintage
        wooden leather metal plastic cute happy handmade homemade digital royalty-free free new old big small
        fresh red orange blue green yellow black white pink purple brown grey gray beige navy maroon dark bright
        young adult asian african american european chinese japanese indian italian french english spanish
        german mexican thai round best top empty local flat rough upper lower own open late long-sleeve
    """,
    "VB": """
        bake bring eat sit stand wear hold play ride walk click buy get make see find shop learn look add come
        go enjoy visit
    """,
    "VBZ": "sits stands wears holds plays walks looks lies flies runs eats jumps rides",
    "VBG": """
        sitting standing wearing holding riding walking running playing looking eating lying laying flying
        jumping surfing skateboarding smiling using carrying hanging posing leaning talking swimming drinking
        skiing cooking
    """,
    "VBN": """
        parked seated dressed surrounded filled covered topped isolated displayed placed stacked taken made
        drawn
    """,
}

FUNCTION_WORDS: Mapping[str, str] = {word: tag for tag, words in _FUNCTION_WORDS.items() for word in words.split()}
CORRECTIONS: Mapping[str, str] = {word: tag for tag, words in _CORRECTIONS.items() for word in words.split()}

COLOURS = frozenset("red orange yellow green blue purple pink brown black white grey gray beige".split())

COLOUR_NOUNS = frozenset(
    """
    jet sky navy baby rose ice midnight forest mint lime army sea steel slate powder ash salmon lemon chestnut plum
    violet amber cobalt emerald azure scarlet crimson ivory tangerine chocolate lavender coral teal turquoise peach
    cream charcoal burgundy mustard olive khaki gold silver bronze copper pearl
    """.split()
)
"""Nouns that are colours where an adjective follows."""

TRANSITIVE = frozenset(
    """
    wearing holding using making eating drinking playing riding carrying taking showing featuring including buying
    selling cooking baking cutting reading writing watching driving having getting doing adding creating feeding
    catching pulling pushing throwing hitting kicking crossing visiting exploring celebrating enjoying introducing
    finding choosing learning teaching washing cleaning painting drawing giving wrapping chasing hugging kissing
    """.split()
)
"""Verbs whose object may follow without an article."""

COMPOUND_PARTICIPLES = frozenset(
    """
    covered drawn made filled shaped coated colored coloured stuffed wrapped roasted fried baked grilled smoked painted
    printed crafted powered lined topped inspired themed woven sized based dyed
    """.split()
)
"""Participles that make an adjective with the noun before them ("a snow covered road")."""

PLURAL_MODIFIERS = frozenset("sports ladies kids women men girls boys arts sales news goods games".split())
"""Plurals that stand before another noun ("ladies watch")."""

# Read as one preposition, so that "front" in "in front of" is no object.
PREPOSITIONS = tuple(
    tuple(line.split())
    for line in (
        "in front of",
        "on top of",
        "at the top of",
        "at the bottom of",
        "in the middle of",
        "in the center of",
        "in the centre of",
        "to the left of",
        "to the right of",
        "on the left of",
        "on the right of",
        "on the side of",
        "at the side of",
        "on the back of",
        "at the back of",
        "in the back of",
        "left of",
        "right of",
        "next to",
        "close to",
        "due to",
        "because of",
        "instead of",
        "out of",
        "such as",
        "as well as",
        "in between",
        "in the background",
        "in the foreground",
        "for sale",
        "for free",
    )
)
# Before a noun they count like "some".
QUANTIFIERS = tuple(tuple(line.split()) for line in ("a lot of", "lots of", "a couple of", "a number of", "plenty of"))
