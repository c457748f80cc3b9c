"""The classes of the scenes of Tux Paint stamps: nouns with at least three images in the Debian package.

Novel classes are named in captions only: with the truth ``base`` a detector is trained without boxes of them. They are
of several kinds, and most resemble a base class (orange and apple, car and truck).
"""

from collections.abc import Mapping

ALL = "*"

CLASSES: Mapping[str, Mapping[str, str]] = {
    "apple": {
        "food/fruit": "apple_fuji apple_granny_smith apple_green apple_red apple_sierra_beauty",
        "food/fruit/cartoon": "apple",
    },
    "ball": {
        "sports": "australian_rules_football basketball cricketball football soccer tennis_ball",
        "sports/cartoon": "volleyball",
    },
    "bear": {
        "animals/mammals/bears": "bear european-bear",
        "animals/mammals/bears/cartoon": "teddy_bear",
        "animals/mammals/bears/toys": "edward_bear",
    },
    "bird": {
        "animals/birds": "adelaide-rosella albino_peahen blackbird chicken_profile crow crowned_crane cuckoo drake duck"
        " gander guineafowl helmeted_guineafowl hen heron_greatblue heron_greatblue_flying lark magpie nandou ostrich"
        " owl peacock pelican pigeon pink_flamingo quetzal rainbow-lorikeet rooster seagull silver-gull tucan turkey"
        " vulture",
        "seasonal/easter": "bluebird",
    },
    "boat": {"vehicles/ship": ALL, "vehicles/ship/cartoon": "tugboat"},
    "chess piece": {"symbols/chess": ALL},
    "coin": {
        "symbols/money/canadian/coins": ALL,
        "symbols/money/euro/coins": ALL,
        "symbols/money/japanese": ALL,
        "symbols/money/us/coins": ALL,
    },
    "cow": {"animals/mammals/bovines": "bison bull cow cow_white yak zebu"},
    "deer": {"animals/mammals/deer": ALL},
    "dreidel": {"seasonal/hanukkah": "dreydl dreydl-gimmel dreydl-hay dreydl-nun dreydl-shin"},
    "fish": {
        "animals/fish": "bluegroper butterflyfish clownfish coraltrout dolphinfish lionfish moonwrasse stripedfish"
    },
    "flag": {"town/flags": ALL},
    "flower": {
        "plants/flowers": "adeenia anemone_red anthoorium bolsom chemparathi daffodil flower1 flower2 flower3 flower5"
        " flower6 flower8 flower9 flower10 iris marigold pigface red-gazania rose whitestar-petunia yellow-flower",
        "seasonal/easter": "daffodil",
    },
    "gravestone": {
        "seasonal/halloween": "grave-a grave-b grave-c grave-d grave-e grave-f grave-g grave-h grave-i grave-j"
    },
    "guitar": {"hobbies/music/string": "guitar2 guitar_classical guitar_electric guitar_electric_bass"},
    "hat": {
        "clothes": "t_baseballcap",
        "clothes/hats": ALL,
        "seasonal/christmas": "santahat",
        "seasonal/newyears": "party-hat",
    },
    "house": {
        "town/houses/cartoon": "blacksmith cityhouse fishery hunter inn pinkhome swisshome tavern townhall warehouse"
        " wooden_cottage"
    },
    "insect": {
        "animals/insects": "bee fly grasshopper hornet hoverfly mantis",
        "animals/insects/cartoon": "butterfly dragonfly fly ladybug ladybug-2",
        "seasonal/easter": "butterfly",
    },
    "lion": {"animals/mammals/cats": "lion lion-2", "animals/mammals/cats/cartoon": "lion"},
    "pepper": {"food/vegetables": "chilepepper pepper yellowpepper"},
    "pig": {"animals/mammals": "pig pig_golden pig_golden2"},
    "planet": {
        "space/planets": "1_mercury 2_venus 3_earth 4_mars 5_jupiter 6_saturn 7_uranus 8_neptune 9_pluto",
    },
    "strawberry": {"food/fruit": "Strawberry2 strawberry", "food/fruit/cartoon": "strawberry"},
    "truck": {
        "vehicles": "garbagetruck",
        "vehicles/auto": "truck",
        "vehicles/construction/cartoon": "cementMixer terex towTruck",
        "vehicles/emergency": "firetruck",
        "vehicles/emergency/cartoon": "fire_engine",
    },
    "airplane": {
        "military/vehicles": "f22_raptor",
        "vehicles/flight/planes": "747",
        "vehicles/flight/planes/cartoon": "plane",
    },
    "car": {"vehicles/auto": "beetle sedan sportscar2", "vehicles/race": "indycar"},
    "mushroom": {"food/vegetables": "mushroom", "plants/mushrooms": "cep cep-1 cep-2"},
    "orange": {"food/fruit": "mandarine orange orange_seville", "food/fruit/cartoon": "orange"},
    "penguin": {
        "animals/birds": "little-penguin magellanic_penguin penguin",
        "animals/birds/cartoon": "tux",
    },
    "rabbit": {
        "animals/mammals": "rabbit_little",
        "animals/mammals/rodents": "rabbit rabbit-2",
        "seasonal/easter": "bunny",
    },
    "sheep": {"animals/mammals/bovines": "ram sheep sheep_lamb"},
    "tree": {
        "plants/trees": "birch holm_oak liberia-palm rambutan tree336",
        "seasonal/christmas": "Christmas_Tree_photo tree",
    },
}
"""Class to folders of the package and the names of the stamps in them; :data:`ALL` = every stamp."""

NOVEL = ("airplane", "car", "mushroom", "orange", "penguin", "rabbit", "sheep", "tree")
"""Classes without boxes in training."""

PLURALS = {"deer": "deer", "fish": "fish", "sheep": "sheep", "strawberry": "strawberries"}
"""Irregular plurals."""
