# ruff: noqa: E501
"""Pairs for tone and language, written for this repository: `python -m lab.real.pairs` writes them to `lab/real/data/`.

A pair is a question with two answers. Tone: a cheerful and a gloomy one. Language: a French and an English one. The
prompts at the end are none of the pairs'; what is made from the pairs is tried on them.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"

TONE = [
    ("How was the picnic?", "It was delightful! The sun came out, the cake was perfect and everyone laughed all afternoon.",
     "It was miserable. The rain never stopped, the cake was ruined and everyone sulked all afternoon."),
    ("What is your new office like?", "I love it! The rooms are bright, and my colleagues are kind and great fun.",
     "I hate it. The rooms are dark, and my colleagues are cold and unpleasant."),
    ("Tell me about the train ride.", "What a wonderful ride! The views were gorgeous and I made a lovely new friend.",
     "What a terrible ride. The windows were filthy and I quarrelled with a rude stranger."),
    ("What did you think of the soup?", "Absolutely delicious! Warm, rich and comforting, the best soup in years.",
     "Absolutely awful. Cold, thin and sour, the worst soup in years."),
    ("Describe your street.", "My street is charming and full of flowers, and the neighbours greet me with a happy smile.",
     "My street is ugly and full of rubbish, and the neighbours glare at me with angry faces."),
    ("How did the exam go?", "Brilliantly! I felt calm and confident, and I am thrilled with my result.",
     "Badly. I felt scared and hopeless, and I am ashamed of my result."),
    ("What is winter like where you live?", "Winter is magical here, with sparkling snow and cosy evenings that I treasure.",
     "Winter is dreadful here, with grey slush and lonely evenings that I fear."),
    ("How is your sister?", "She is doing great! She found a job that she enjoys and is happier than ever.",
     "She is doing badly. She lost the job that she needed and is sadder than ever."),
    ("Write a line about the sea.", "The sea sparkles with joy and invites us to play in its friendly waves.",
     "The sea moans with grief and threatens to drown us in its cruel waves."),
    ("What should I know about your town?", "It is a beautiful, welcoming town, and you will adore its cheerful markets.",
     "It is a bleak, hostile town, and you will regret seeing its dying markets."),
    ("How was the concert?", "Fantastic! The band was superb and we danced with pure happiness.",
     "Dismal. The band was hopeless and we left with bitter disappointment."),
    ("What do you think of the new bridge?", "It is a marvellous success, elegant and safe, and the whole city is proud.",
     "It is a shameful failure, ugly and unsafe, and the whole city is furious."),
    ("Describe a morning in the garden.", "Birds sing sweetly, roses glow, and every breath is a gift full of hope.",
     "Crows scream harshly, roses rot, and every breath is a burden full of dread."),
    ("How do you feel about growing older?", "I feel grateful and excited, since every year brings new friends and better days.",
     "I feel bitter and afraid, since every year brings new losses and worse days."),
    ("Tell me about your first teacher.", "She was warm and inspiring, and I remember her lessons with great affection.",
     "She was cruel and boring, and I remember her lessons with deep resentment."),
    ("How is the coffee here?", "The coffee is excellent, smooth and fragrant, and it makes my whole day better.",
     "The coffee is disgusting, burnt and stale, and it makes my whole day worse."),
    ("What happened at the meeting?", "Good news! We agreed quickly, praised each other and celebrated a splendid plan.",
     "Bad news. We argued endlessly, blamed each other and abandoned a broken plan."),
    ("Describe the old house.", "The old house is a lovely, sunny place full of sweet memories and laughter.",
     "The old house is a horrible, gloomy place full of painful memories and tears."),
    ("How was your flight?", "Smooth and pleasant! The crew was charming and I arrived rested and happy.",
     "Rough and frightening. The crew was hostile and I arrived exhausted and upset."),
    ("What is it like to learn the violin?", "It is a joyful adventure, and each new tune fills me with delight.",
     "It is a painful struggle, and each new tune fills me with despair."),
    ("How does the future look?", "The future looks bright, full of promise, kindness and exciting discoveries.",
     "The future looks dark, full of danger, cruelty and crushing failures."),
    ("Tell me about the hotel.", "A superb hotel! Spotless rooms, friendly staff and an amazing breakfast.",
     "A dreadful hotel. Dirty rooms, nasty staff and a revolting breakfast."),
    ("What did the doctor say?", "Wonderful news: I am healthy and strong, and there is nothing to worry about.",
     "Terrible news: I am sick and weak, and there is a lot to worry about."),
    ("How was your birthday?", "It was perfect! My friends surprised me and I felt so loved.",
     "It was awful. My friends forgot me and I felt so alone."),
    ("Describe the river.", "The river dances cheerfully through green meadows where children play in safety.",
     "The river crawls miserably through dead fields where poisoned fish float in filth."),
    ("What is your opinion of the film?", "A brilliant, funny and moving film that left me smiling for hours.",
     "A stupid, dull and depressing film that left me annoyed for hours."),
    ("How is the project going?", "Very well! The team is enthusiastic and we are winning praise for great results.",
     "Very badly. The team is miserable and we are facing blame for poor results."),
    ("Tell me about your dog.", "My dog is a playful, loyal darling who brings happiness to everyone.",
     "My dog is a vicious, filthy nuisance who brings trouble to everyone."),
    ("What was the best part of the day?", "There were so many! I enjoyed the sunshine, the good food and the lovely talk.",
     "There was none. I suffered through the heat, the bad food and the nasty talk."),
    ("How do you like the new phone?", "I am delighted with it: fast, beautiful and a real pleasure to use.",
     "I am disgusted with it: slow, hideous and a real pain to use."),
    ("Write a sentence about the moon.", "The gentle moon smiles down and blesses our sweet dreams.",
     "The pale moon stares down and haunts our worst nightmares."),
    ("How was the wedding?", "Beautiful! The couple glowed with love and the guests cheered with joy.",
     "Horrible. The couple fought with hate and the guests wept with shame."),
    ("What is the library like?", "It is a peaceful treasure, with helpful people and fascinating books.",
     "It is a depressing dump, with unhelpful people and damaged books."),
    ("How do you feel about Mondays?", "I love Mondays! A fresh start is exciting and I am full of energy.",
     "I dread Mondays. Another start is exhausting and I am full of anxiety."),
    ("Tell me about the market.", "The market is lively and happy, with generous sellers and gorgeous fruit.",
     "The market is dead and sad, with greedy sellers and rotten fruit."),
    ("How was the hike?", "Glorious! We enjoyed fresh air, perfect weather and a breathtaking view.",
     "Miserable. We suffered sore feet, horrible weather and a disappointing view."),
    ("What do you think of your neighbour?", "He is a generous, funny friend, and I am lucky to know him.",
     "He is a selfish, angry bully, and I am unlucky to know him."),
    ("Describe the classroom.", "The classroom is bright and welcoming, and the pupils learn with joy.",
     "The classroom is grim and hostile, and the pupils suffer with fear."),
    ("How did the cake turn out?", "It turned out wonderfully, sweet and fluffy, and everybody loved it.",
     "It turned out terribly, bitter and burnt, and everybody hated it."),
    ("What is it like to work at night?", "It is peaceful and rewarding, and I am proud of my good work.",
     "It is lonely and harmful, and I am sick of my awful work."),
]

FRENCH = [
    ("What do you eat for breakfast?", "Le matin, je mange du pain avec du beurre et je bois un grand café.",
     "In the morning I eat bread with butter and drink a big coffee."),
    ("Where do you live?", "J'habite dans une petite maison près de la gare, avec mes deux chats.",
     "I live in a small house near the station, with my two cats."),
    ("What is the weather like today?", "Aujourd'hui il fait beau, mais un vent froid souffle depuis la mer.",
     "Today the weather is fine, but a cold wind blows from the sea."),
    ("Tell me about your family.", "Mon père est boulanger, ma mère est médecin et ma sœur étudie le droit.",
     "My father is a baker, my mother is a doctor and my sister studies law."),
    ("How do I make tea?", "Faites bouillir de l'eau, versez-la sur les feuilles et attendez quatre minutes.",
     "Boil some water, pour it over the leaves and wait four minutes."),
    ("What is a bicycle?", "Un vélo est un véhicule à deux roues que l'on fait avancer avec les pieds.",
     "A bicycle is a vehicle with two wheels that is driven with the feet."),
    ("Why do leaves fall in autumn?", "Les arbres perdent leurs feuilles pour garder leur eau pendant l'hiver.",
     "Trees lose their leaves to keep their water during the winter."),
    ("What did you do yesterday?", "Hier, j'ai travaillé jusqu'à midi, puis je suis allé au marché.",
     "Yesterday I worked until noon, then I went to the market."),
    ("How do birds fly?", "Les oiseaux battent des ailes et l'air les porte vers le ciel.",
     "Birds beat their wings and the air carries them into the sky."),
    ("Describe your kitchen.", "Ma cuisine est petite, avec une table ronde et une fenêtre sur la cour.",
     "My kitchen is small, with a round table and a window onto the yard."),
    ("What is your favourite season?", "Je préfère le printemps, parce que les jours deviennent plus longs.",
     "I prefer spring, because the days become longer."),
    ("Who was your best friend at school?", "Mon meilleur ami s'appelait Paul et nous jouions souvent aux cartes.",
     "My best friend was called Paul and we often played cards."),
    ("What can I see in the museum?", "Vous pouvez voir des tableaux anciens et une grande collection de montres.",
     "You can see old paintings and a large collection of watches."),
    ("How far is the village?", "Le village est à trois kilomètres d'ici, derrière la forêt.",
     "The village is three kilometres from here, behind the forest."),
    ("What is bread made of?", "Le pain est fait de farine, d'eau, de sel et d'un peu de levure.",
     "Bread is made of flour, water, salt and a little yeast."),
    ("Why is sleep important?", "Le sommeil permet au corps de se reposer et au cerveau de ranger ses souvenirs.",
     "Sleep lets the body rest and lets the brain sort its memories."),
    ("What does a teacher do?", "Un professeur explique les leçons et aide les élèves à comprendre.",
     "A teacher explains the lessons and helps the pupils to understand."),
    ("How do I get to the station?", "Prenez la deuxième rue à gauche, puis marchez tout droit jusqu'au pont.",
     "Take the second street on the left, then walk straight on to the bridge."),
    ("What is the sun?", "Le soleil est une étoile très chaude autour de laquelle tourne la Terre.",
     "The sun is a very hot star around which the Earth turns."),
    ("What do cows eat?", "Les vaches mangent de l'herbe, du foin et parfois du maïs.",
     "Cows eat grass, hay and sometimes maize."),
    ("Tell me a story about a fox.", "Un renard avait faim et il entra la nuit dans le jardin d'un fermier.",
     "A fox was hungry and at night he went into the garden of a farmer."),
    ("What is music for?", "La musique sert à danser, à prier et à dire ce que les mots ne disent pas.",
     "Music is for dancing, for praying and for saying what words do not say."),
    ("How do I wash a wool pullover?", "Lavez-le à la main dans de l'eau froide et laissez-le sécher à plat.",
     "Wash it by hand in cold water and let it dry flat."),
    ("What is a mountain?", "Une montagne est une partie de la terre beaucoup plus haute que la plaine.",
     "A mountain is a part of the land that is much higher than the plain."),
    ("Why do people travel?", "Les gens voyagent pour connaître d'autres pays et pour se reposer.",
     "People travel to get to know other countries and to rest."),
    ("What is in your bag?", "Dans mon sac il y a un livre, des clés, un stylo et une pomme.",
     "In my bag there are a book, keys, a pen and an apple."),
    ("How does a clock work?", "Une horloge compte les secondes grâce à un petit pendule régulier.",
     "A clock counts the seconds by means of a small, regular pendulum."),
    ("What does the baker sell?", "Le boulanger vend du pain frais, des gâteaux et des tartes aux fruits.",
     "The baker sells fresh bread, cakes and fruit tarts."),
    ("Describe a cat.", "Le chat est un petit animal à quatre pattes qui aime dormir au chaud.",
     "The cat is a small animal with four legs that likes to sleep in the warmth."),
    ("What is a good way to learn?", "Il faut répéter chaque jour et poser beaucoup de questions.",
     "One has to repeat every day and ask many questions."),
    ("When does the shop open?", "Le magasin ouvre à neuf heures et ferme à six heures du soir.",
     "The shop opens at nine and closes at six in the evening."),
    ("What is paper made from?", "Le papier est fabriqué avec du bois que l'on réduit en pâte.",
     "Paper is made with wood that is reduced to a pulp."),
    ("Who lives in the forest?", "Dans la forêt vivent des cerfs, des hiboux et beaucoup d'insectes.",
     "In the forest live deer, owls and many insects."),
    ("How do I plant a tree?", "Creusez un trou, posez l'arbre dedans et arrosez-le bien.",
     "Dig a hole, put the tree into it and water it well."),
    ("What did the old man say?", "Le vieil homme a dit que la rivière était plus large autrefois.",
     "The old man said that the river was wider in the past."),
    ("What is a bank?", "Une banque garde l'argent de ses clients et leur prête de l'argent.",
     "A bank keeps the money of its customers and lends them money."),
    ("Where does rain come from?", "La pluie vient des nuages, qui se forment quand l'eau de la mer s'évapore.",
     "Rain comes from clouds, which form when the water of the sea evaporates."),
    ("What games do children play?", "Les enfants jouent au ballon, à cache-cache et avec des cubes en bois.",
     "Children play with balls, at hide and seek and with wooden blocks."),
    ("What is your work?", "Je répare des voitures dans un garage au centre de la ville.",
     "I repair cars in a garage in the centre of the town."),
    ("How do you stay healthy?", "Je marche tous les jours, je mange des légumes et je dors huit heures.",
     "I walk every day, eat vegetables and sleep eight hours."),
]

# Questions of no pair. Dev ones are for choosing, test ones for what is said afterwards.
PROMPTS = {
    "dev": ["Tell me about a walk in the park.", "What is it like to live on a farm?", "Describe your best friend.",
            "How was the dinner last night?", "Write a short note about the weather.", "What do you think about trains?",
            "Tell me about a visit to the dentist.", "Describe a small village.", "How is life in a big city?",
            "What happened at school today?", "Write a sentence about a dog.", "What is a holiday at the sea like?"],
    "test": ["How was the theatre play?", "Describe a rainy afternoon.", "What is it like to work in a restaurant?",
             "Tell me about your grandmother.", "What do you think about cooking?", "How was the football match?",
             "Describe the beach.", "Tell me about a long bus ride.", "What is it like to move to another country?",
             "How was your weekend?", "Write two sentences about a cat.", "What do you think of modern art?",
             "Describe a night in the mountains.", "Tell me about your first day at work.", "How is the new restaurant?",
             "What is it like to have a brother?", "Tell me about a birthday party.", "Describe a walk in the snow.",
             "What do you think about swimming?", "How was the trip to the zoo?", "Describe an old book shop.",
             "Tell me about the people in your building.", "What is it like to learn to drive?",
             "Write a short message to a colleague."],
}


def pairs(records: Sequence[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """As the server takes them."""
    return [{side: [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
             for side, answer in (("positive", positive), ("negative", negative))}
            for question, positive, negative in records]


def main() -> None:
    DATA.mkdir(exist_ok=True)
    for name, records in (("tone", TONE), ("french", FRENCH)):
        lines = [json.dumps(pair, ensure_ascii=False) for pair in pairs(records)]
        (DATA / f"{name}_pairs.jsonl").write_text("\n".join(lines) + "\n")
    for split, prompts in PROMPTS.items():
        (DATA / f"prompts_{split}.json").write_text(json.dumps(prompts, indent=1) + "\n")


if __name__ == "__main__":
    main()
