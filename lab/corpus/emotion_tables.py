"""Tables of the emotions skill. No situation names an emotion.

Each event is a sentence about one person with a slot {x}; the first options make it moving, the
second ones are its neutral twin: same people, same form, nothing at stake.
"""

from __future__ import annotations

# emotion -> events (template, moving options, neutral options). {n} name, {p} she/he, {q} her/his.
EVENTS: dict[str, list[tuple[str, list[str], list[str]]]] = {
    "afraid": [
        ("{n} saw a {x} in the dark cellar", ["snake", "rat", "stranger", "ghost"],
         ["bucket", "ladder", "bench", "carpet"]),
        ("At night {n} heard {x} behind the door",
         ["heavy steps", "a scream", "a growl", "a gun"],
         ["some music", "the rain", "a clock", "the radio"]),
        ("The {x} came closer and closer to {n}", ["bear", "wolf", "tiger", "fire"],
         ["bus", "duck", "train", "boat"]),
        ("{n} stood alone {x}", ["on the thin ice", "at the edge of the cliff",
                                 "in the burning house", "in the sinking boat"],
         ["in the long hall", "at the bus stop", "in the empty shop", "in the small office"]),
    ],
    "sad": [
        ("The {x} of {n} died last night", ["dog", "grandmother", "cat", "best friend"],
         ["lamp", "phone", "radio", "engine"]),
        ("{n} read that {q} {x}", ["friend was gravely ill", "old home was gone",
                                   "brother would not return", "dearest friend had moved away"],
         ["train was on time", "order was on its way", "ticket was printed", "book was returned"]),
        ("At the {x} {n} thought of {q} father", ["funeral", "grave", "hospital bed", "farewell"],
         ["bus stop", "counter", "crossing", "copy machine"]),
        ("{n} had to {x} for good", ["leave the farm", "give the puppy away",
                                     "say goodbye to the children", "bury the little bird"],
         ["change the password", "move the desk", "close the old account", "replace the bulb"]),
    ],
    "angry": [
        ("Somebody {x} the bicycle of {n}", ["scratched", "stole", "kicked", "smashed"],
         ["passed", "noticed", "measured", "counted"]),
        ("The neighbor {x} {n} again", ["lied to", "insulted", "cheated", "mocked"],
         ["greeted", "called", "passed", "wrote to"]),
        ("The clerk {x} {n} for no reason", ["shouted at", "pushed", "blamed", "ignored"],
         ["nodded at", "looked at", "numbered", "listed"]),
        ("A man {x} and {n} saw it", ["jumped the line", "hit a dog", "broke the promise",
                                      "tore up the letter"],
         ["joined the line", "fed a dog", "wrote a note", "folded the letter"]),
    ],
    "happy": [
        ("{n} won {x}", ["the first prize", "the race", "a trip to the sea", "the big game"],
         ["some paper", "a plain pen", "an old form", "a spare button"]),
        ("The whole family {x} {n}", ["danced with", "sang for", "hugged", "threw a party for"],
         ["sat behind", "waited for", "stood near", "walked past"]),
        ("{n} heard that {x}", ["the war was over", "the baby was healthy",
                                "the holidays began", "an old friend was coming"],
         ["the shop was open", "the bus was full", "the week began", "the mail was coming"]),
        ("On {q} birthday {n} found {x} at the door", ["a puppy with a ribbon", "all {q} friends",
                                                       "a new bicycle", "a huge cake"],
         ["a brown box", "two newspapers", "a plain envelope", "an empty bottle"]),
    ],
    "surprised": [
        ("{n} opened the fridge and found {x}", ["a live penguin", "a crown", "a talking fish",
                                                 "a thousand coins"],
         ["some milk", "an egg", "a lemon", "some butter"]),
        ("{x} on the roof of {n}", ["A camel stood", "A balloon landed", "An elephant sat",
                                    "A piano appeared"],
         ["A pigeon stood", "A leaf landed", "A crow sat", "Some moss grew"]),
        ("{n} looked out and the {x}", ["lake was gone", "sky was green", "street was full of sheep",
                                        "moon was square"],
         ["lake was gray", "sky was cloudy", "street was full of cars", "moon was round"]),
        ("All at once the {x} spoke to {n}", ["statue", "tree", "horse", "painting"],
         ["guide", "clerk", "driver", "waiter"]),
    ],
    "disgusted": [
        ("There was a {x} in the soup of {n}", ["cockroach", "dead fly", "hair", "worm"],
         ["carrot", "noodle", "bean", "mushroom"]),
        ("{n} smelled {x} in the kitchen", ["rotten fish", "old vomit", "spoiled meat",
                                            "a dead mouse"],
         ["fresh bread", "warm tea", "boiled rice", "a cut onion"]),
        ("{n} stepped into {x}", ["a pile of dung", "slimy mud", "a pool of spit", "rotten fruit"],
         ["a pile of hay", "dry sand", "a pool of light", "fallen leaves"]),
        ("The sink of {n} was full of {x}", ["maggots", "green slime", "mold", "bloody rags"],
         ["plates", "clear water", "cups", "clean towels"]),
    ],
    "proud": [
        ("{n} {x} all by {q} own hands", ["built a boat", "saved a drowning man",
                                          "raised three orphans", "restored the old tower"],
         ["carried a bag", "opened a can", "turned three pages", "closed the old window"]),
        ("The teacher {x} {n} before the class", ["honored", "applauded", "rewarded", "saluted"],
         ["seated", "called", "counted", "named"]),
        ("After years of work {n} {x}", ["became a doctor", "finished the great novel",
                                         "received the medal", "led the orchestra"],
         ["became a member", "finished the usual form", "received the bill", "left the office"]),
        ("The daughter of {n} {x}", ["won the contest", "graduated first", "broke the record",
                                     "rescued a child"],
         ["took the bus", "sat first", "wrote the list", "called a taxi"]),
    ],
    "guilty": [
        ("{n} {x} and told nobody", ["broke the vase of a friend", "took money from the box",
                                     "cheated in the exam", "let the bird escape"],
         ["moved the vase of a friend", "took paper from the box", "sat in the exam",
          "let the bird sing"]),
        ("{n} {x} {q} little sister", ["lied to", "hit", "forgot", "betrayed"],
         ["waved to", "met", "drove", "photographed"]),
        ("Because of {n} {x}", ["the wrong man went to prison", "the dog was run over",
                                "the whole team lost", "a worker was fired"],
         ["the right man went to lunch", "the dog was on time", "the whole team met",
          "a worker was called"]),
        ("{n} had promised to come but {x}", ["stayed in bed", "went to a party instead",
                                              "forgot the sick friend", "turned off the phone"],
         ["came a little later", "sent a message first", "took another road",
          "met them at the gate"]),
    ],
}
NEUTRAL = "calm"

# What the person then does: another readout of the emotion, without its name.
REACTIONS: dict[str, list[str]] = {
    "afraid": ["{P} ran away and locked the door.", "{P} trembled and called for help."],
    "sad": ["{P} wept for a long time.", "Tears ran down {q} face."],
    "angry": ["{P} shouted and slammed the door.", "{P} clenched {q} fists."],
    "happy": ["{P} laughed and danced.", "{P} sang all the way home."],
    "surprised": ["{P} stared with an open mouth.", "{P} blinked and looked again."],
    "disgusted": ["{P} turned away and held {q} nose.", "{P} washed {q} hands twice."],
    "proud": ["{P} stood tall and told everyone.", "{P} raised {q} head."],
    "guilty": ["{P} lowered {q} eyes and apologized.", "{P} could not look at anyone."],
    "calm": ["{P} went on with the day.", "{P} sat down and read the paper."],
}
SETTINGS = [
    "in the morning", "on Monday", "after work", "in the village", "before lunch", "in winter",
    "on a rainy day", "during the week", "late in the evening", "in the old town", "on the way home",
    "last summer", "at noon", "on the weekend", "near the harbor", "in the north",
]
