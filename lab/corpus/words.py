"""Words several skills share. Written for this project; no text is copied from elsewhere."""

from __future__ import annotations

WOMEN = """Anna Maria Clara Julia Emma Nora Lucy Helen Alice Sofia Laura Grace Eva Rosa Irene Olga
Diana Martha Ruth Vera Ida Mina Flora Stella Hanna Lena Tara Nina Paula Greta""".split()
MEN = """Tom Peter David Oscar Henry Felix Hugo Simon Daniel Martin Paul Victor Leo Adam Jonas
Walter Max Edgar Ivan Carl Frank Otto Ralph Bruno Samuel Anton Emil Lukas Karim Noah""".split()
PRONOUNS = {**{n: ("she", "her") for n in WOMEN}, **{n: ("he", "his") for n in MEN}}
NAMES = WOMEN + MEN

WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = """January February March April May June July August September October November
December""".split()
LETTERS = [chr(c) for c in range(ord("A"), ord("Z") + 1)]
NUMBERS = """one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen twenty""".split()

COMPANIONS = """my sister|my brother|my mother|my father|a friend|two friends|my family|my wife
|my husband|a colleague|my neighbor|my cousin|my aunt|my uncle|my team|my class|my daughter|my son
|an old friend|my grandmother|my grandfather|some students""".replace("\n", "").split("|")

PLACES = """park market station library school office garden kitchen harbor museum bakery church
bridge forest river lake beach mountain village city farm field hospital theater square street
factory castle tower cafe hotel shop stadium cinema airport bank garage barn mill island valley
meadow cave well temple palace attic cellar balcony corner""".split()

COLORS = """red blue green yellow white black brown gray orange purple pink silver golden""".split()

ANIMALS = """dog cat horse cow sheep goat pig rabbit fox wolf bear deer mouse duck goose hen
eagle owl parrot turtle frog snake lion tiger monkey camel donkey squirrel hedgehog
seal otter beaver crow swan bee ant spider""".split()

THINGS = """box key lamp chair table book letter coin map bottle basket hat coat shoe ring clock
mirror candle rope bag knife spoon cup plate blanket pillow umbrella ladder hammer bell ball kite
drum flute camera phone radio picture ticket stone feather shell leaf apple pear lemon bread cake
cheese egg onion carrot flower seed""".split()

SIZES = "small large old new heavy light round long short strange simple plain tall tiny huge".split()
