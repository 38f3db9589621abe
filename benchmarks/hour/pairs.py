# ruff: noqa: E501
"""Pairs and prompts of the hour, written for it and used for nothing else: no default was chosen on them.

They are other ones than those in `lab/real`, on which the trial's own settings were chosen.
"""

import random
from typing import Any

THINGS = ("journey", "lecture", "garden", "apartment", "dinner", "interview", "museum", "hotel", "walk", "boat trip",
          "wedding", "match", "course", "neighbourhood", "meeting", "bakery", "festival", "school trip", "visit", "job",
          "play", "trip to the lake", "new car", "holiday", "concert", "party", "conference", "swimming pool", "farm",
          "evening", "film", "library", "lesson", "market", "camp", "restaurant", "dance", "cottage", "office", "parade")
GOOD = ("wonderful", "delightful", "cheerful", "lovely", "excellent", "charming", "beautiful", "fantastic", "pleasant",
        "glorious", "superb", "brilliant", "joyful", "splendid", "friendly")
BAD = ("awful", "dreadful", "gloomy", "ugly", "terrible", "unpleasant", "horrible", "miserable", "disgusting", "dismal",
       "nasty", "boring", "painful", "hostile", "depressing")
GOOD_ENDS = ("I felt happy the whole time.", "Everyone smiled and laughed.", "I would love to do it again.",
             "We all enjoyed every minute.", "I am so grateful for it.", "It made my day brighter.")
BAD_ENDS = ("I felt sad the whole time.", "Everyone frowned and complained.", "I would hate to do it again.",
            "We all suffered every minute.", "I am so angry about it.", "It made my day darker.")
ASKED = ("How was the {}?", "What did you think of the {}?", "Tell me about the {}.", "Describe the {}.")

FRENCH = (
    ("Where is the cat?", "Le chat dort sur la chaise de la cuisine.", "The cat is sleeping on the kitchen chair."),
    ("What is a lake?", "Un lac est une grande étendue d'eau entourée de terre.", "A lake is a large body of water surrounded by land."),
    ("Why do we drink water?", "Nous buvons de l'eau parce que notre corps en a besoin chaque jour.", "We drink water because our body needs it every day."),
    ("Describe your room.", "Ma chambre est claire et il y a un lit, une table et deux livres.", "My room is bright and there are a bed, a table and two books."),
    ("What did you buy?", "J'ai acheté des pommes, du fromage et une bouteille de lait.", "I bought apples, cheese and a bottle of milk."),
    ("How old is the church?", "L'église a plus de quatre cents ans et elle est toujours ouverte.", "The church is more than four hundred years old and it is still open."),
    ("What do you do in the evening?", "Le soir, je lis un livre ou je parle avec mes amis.", "In the evening I read a book or talk with my friends."),
    ("Who is at the door?", "C'est le voisin, il apporte une lettre pour toi.", "It is the neighbour, he is bringing a letter for you."),
    ("What is honey?", "Le miel est un aliment sucré que les abeilles font avec les fleurs.", "Honey is a sweet food that bees make from flowers."),
    ("How do I clean a window?", "Prenez un chiffon propre, de l'eau chaude et un peu de savon.", "Take a clean cloth, hot water and a little soap."),
    ("Where does the train go?", "Le train va vers le sud et il arrive à la mer avant midi.", "The train goes to the south and it reaches the sea before noon."),
    ("What is winter like?", "En hiver il fait froid, la neige tombe et les nuits sont longues.", "In winter it is cold, the snow falls and the nights are long."),
    ("Tell me about your brother.", "Mon frère travaille dans une banque et il a trois enfants.", "My brother works in a bank and he has three children."),
    ("What is a hammer for?", "Un marteau sert à enfoncer des clous dans le bois.", "A hammer is used to drive nails into wood."),
    ("Why are you late?", "Je suis en retard parce que le bus est tombé en panne.", "I am late because the bus broke down."),
    ("What do fish eat?", "Les poissons mangent des plantes, des insectes et d'autres poissons.", "Fish eat plants, insects and other fish."),
    ("Describe the market.", "Sur le marché, on vend des légumes, du poisson et des fleurs.", "At the market they sell vegetables, fish and flowers."),
    ("How does a candle work?", "La flamme fait fondre la cire, qui monte dans la mèche et brûle.", "The flame melts the wax, which rises in the wick and burns."),
    ("What did she say?", "Elle a dit qu'elle viendrait demain avec sa fille.", "She said that she would come tomorrow with her daughter."),
    ("What is a poem?", "Un poème est un texte court qui parle souvent de sentiments.", "A poem is a short text that often speaks of feelings."),
    ("Where are the keys?", "Les clés sont dans la poche de mon manteau gris.", "The keys are in the pocket of my grey coat."),
    ("How was the lesson?", "La leçon était longue, mais j'ai appris beaucoup de mots.", "The lesson was long, but I learned many words."),
    ("What is a doctor?", "Un médecin est une personne qui soigne les malades.", "A doctor is a person who treats the sick."),
    ("Why is the street closed?", "La rue est fermée parce que des ouvriers réparent la route.", "The street is closed because workers are repairing the road."),
    ("What do you see?", "Je vois une rivière, un vieux pont et quelques bateaux.", "I see a river, an old bridge and a few boats."),
    ("What can I cook tonight?", "Tu peux faire une soupe avec des carottes et des pommes de terre.", "You can make a soup with carrots and potatoes."),
    ("Tell me about the king.", "Le roi vivait seul dans un château au bord de la forêt.", "The king lived alone in a castle at the edge of the forest."),
    ("What is glass?", "Le verre est une matière dure et transparente faite avec du sable.", "Glass is a hard and clear material made from sand."),
    ("How do children learn?", "Les enfants apprennent en jouant et en regardant les adultes.", "Children learn by playing and by watching adults."),
    ("What time is it?", "Il est trois heures et quart, nous avons encore du temps.", "It is a quarter past three, we still have time."),
    ("Who wrote the letter?", "Ma tante a écrit cette lettre quand elle était jeune.", "My aunt wrote this letter when she was young."),
    ("Where do you work?", "Je travaille dans un petit bureau près du port.", "I work in a small office near the harbour."),
    ("What is a desert?", "Un désert est un endroit très sec où il ne pleut presque jamais.", "A desert is a very dry place where it almost never rains."),
    ("Why do dogs bark?", "Les chiens aboient pour avertir leur maître ou pour jouer.", "Dogs bark to warn their master or to play."),
    ("What is the plan?", "Nous partons tôt le matin et nous rentrons dimanche soir.", "We leave early in the morning and we come back on Sunday evening."),
    ("Describe a bird.", "Un oiseau a deux ailes, un bec et des plumes légères.", "A bird has two wings, a beak and light feathers."),
    ("How do I save money?", "Notez vos dépenses et achetez seulement ce qui est nécessaire.", "Write down what you spend and buy only what is necessary."),
    ("What happened in the village?", "Le feu a détruit une grange, mais personne n'est blessé.", "The fire destroyed a barn, but nobody is hurt."),
    ("What is a map?", "Une carte montre les routes, les villes et les rivières d'un pays.", "A map shows the roads, the towns and the rivers of a country."),
    ("What do you wish for?", "Je voudrais une maison avec un jardin et un grand arbre.", "I would like a house with a garden and a big tree."),
)

# SmolLM2 answers cheerfully to nearly everything. These ask for what is sad, dull or neutral, so that a third to a half of
# the untouched answers are positive and there is room for more.
FIRST_TONE_PROMPTS = (
    "How was the funeral?", "Describe an empty house.", "Tell me about the traffic jam.", "Describe a cold, dark street.",
    "What did the critic say about the play?", "Tell me about the power cut.", "Describe an abandoned factory.",
    "What happened in the storm?", "Tell me about the long queue.", "How does a fever feel?", "Tell me about a day at work.",
    "Tell me about the lost luggage.", "Describe the waiting room of a hospital.", "What happened at the court?",
    "Tell me about a flat tyre.", "Tell me about a village in winter.", "Describe a room.", "What happened this morning?",
    "Tell me about the bus strike.", "What do you think about the late train?", "Describe the old cemetery.",
    "What did the angry customer say?", "Tell me about the flood.", "How was the bus ride?",
)
# Of 24 texts one is four points, and the best of 20 random vectors is some 20 points above their mean by chance alone. So
# 72 more were written before any of them was answered, by a rule that leaves nothing to choose afterwards: 18 subjects that
# are sad, 12 dull and 6 neutral ones, as among the first 24, each asked in two of the four forms that most of these have.
SAD = ("the wake", "the eviction", "the lost match", "the hospital visit", "the factory closure", "the goodbye at the station",
       "the failed test", "the burglary", "the ruined harvest", "the last day of the shop", "the layoffs", "the war memorial",
       "the sinking boat", "the sick neighbour", "the broken engine", "the divorce", "the refugee camp", "the frozen pipes")
DULL = ("the tax form", "the waiting list", "the parking garage", "the safety briefing", "the paperwork", "the tram ride",
        "the budget meeting", "the laundry", "the dental check", "the road works", "the grey suburb", "the copy room")
NEUTRAL = ("the corner shop", "the staircase", "the canteen", "the letter", "the harbour", "the afternoon")
FORMS = ("How was {}?", "Tell me about {}.", "What happened with {}?", "Describe {}.")
TONE_PROMPTS = (*FIRST_TONE_PROMPTS, *(FORMS[(n + turn) % len(FORMS)].format(subject) for turn in (0, 1)
                                       for n, subject in enumerate((*SAD, *DULL, *NEUTRAL))))
NEUTRAL_PROMPTS = ("How are you?", "Tell me a story.", "What is a tree?", "Describe a road.", "What is in a box?",
                   "Who lives here?", "How does a lock work?", "Tell me about paper.")
FRENCH_PROMPTS = (
    "What is a bakery?", "Describe your best friend.", "Why do cats sleep so much?", "Tell me about a walk in the park.",
    "What is an island?", "What happened at school today?", "Describe an old clock.", "Where do bees live?",
    "What do you think about trains?", "How was the dinner?", "What is snow?", "Who works in a hospital?",
    "Describe a garden in summer.", "What is life on a farm like?", "What is a bridge for?", "Tell me about your grandmother.",
    "How do I boil potatoes?", "What is the moon?", "Describe a small shop.", "Why do people sing?",
    "What do horses eat?", "Tell me about a day in autumn.", "What is a newspaper?", "Describe the sea at night.",
    "What is a forest?", "Who lives next door?", "Tell me about a wedding.", "Why is the sky blue?", "Describe a quiet street.",
    "What do you eat in the morning?", "How was the journey?", "What is a lighthouse?", "Tell me about your school.",
    "Where do swallows fly in winter?", "What do you think about coffee?", "Describe a railway station.", "What is sand?",
    "How do I wash a jumper?", "What happened on the island?", "Who is the mayor?", "Describe a small dog.",
    "What is a library for?", "Tell me about a long night.", "What do you do on Sundays?", "What is a shadow?",
    "Describe a kitchen.", "Why do leaves fall?", "Tell me about an old car.",
)


def tone() -> list[dict[str, Any]]:
    """40 questions with a cheerful and a gloomy answer, put together from the words above; always the same ones."""
    chance = random.Random(40)
    found = []
    for n, thing in enumerate(THINGS):
        which = chance.sample(range(len(GOOD)), 2)
        end = chance.randrange(len(GOOD_ENDS))
        sides = [f"The {thing} was {words[which[0]]} and {words[which[1]]}. {ends[end]}"
                 for words, ends in ((GOOD, GOOD_ENDS), (BAD, BAD_ENDS))]
        found.append(_pair(ASKED[n % len(ASKED)].format(thing), *sides))
    return found


def french() -> list[dict[str, Any]]:
    return [_pair(*texts) for texts in FRENCH]


def asked(prompts: tuple[str, ...]) -> list[list[dict[str, str]]]:
    """Each as a conversation."""
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


def _pair(question: str, positive: str, negative: str) -> dict[str, Any]:
    return {side: [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
            for side, text in (("positive", positive), ("negative", negative))}
