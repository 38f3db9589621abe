"""Word tables of the in-context tasks. Columns of one table share their input words."""

from __future__ import annotations

# noun, plural, French, Spanish, German, category
_NOUNS = """
cat cats chat gato Katze animal|dog dogs chien perro Hund animal|horse horses cheval caballo Pferd animal
cow cows vache vaca Kuh animal|wolf wolves loup lobo Wolf animal|mouse mice souris ratón Maus animal
goose geese oie ganso Gans animal|bear bears ours oso Bär animal|fish fishes poisson pez Fisch animal
apple apples pomme manzana Apfel fruit|pear pears poire pera Birne fruit
cherry cherries cerise cereza Kirsche fruit|lemon lemons citron limón Zitrone fruit
strawberry strawberries fraise fresa Erdbeere fruit|grape grapes raisin uva Traube fruit
knife knives couteau cuchillo Messer tool|hammer hammers marteau martillo Hammer tool
key keys clé llave Schlüssel tool|brush brushes brosse cepillo Bürste tool
saw saws scie sierra Säge tool|spoon spoons cuillère cuchara Löffel tool
house houses maison casa Haus building|church churches église iglesia Kirche building
tower towers tour torre Turm building|school schools école escuela Schule building
castle castles château castillo Schloss building|factory factories usine fábrica Fabrik building
shirt shirts chemise camisa Hemd clothing|hat hats chapeau sombrero Hut clothing
shoe shoes chaussure zapato Schuh clothing|dress dresses robe vestido Kleid clothing
coat coats manteau abrigo Mantel clothing|scarf scarves écharpe bufanda Schal clothing
hand hands main mano Hand body|foot feet pied pie Fuß body|tooth teeth dent diente Zahn body
eye eyes œil ojo Auge body|nose noses nez nariz Nase body|ear ears oreille oreja Ohr body
tree trees arbre árbol Baum nature|leaf leaves feuille hoja Blatt nature
river rivers rivière río Fluss nature|stone stones pierre piedra Stein nature
cloud clouds nuage nube Wolke nature|mountain mountains montagne montaña Berg nature
child children enfant niño Kind person|woman women femme mujer Frau person
king kings roi rey König person|baker bakers boulanger panadero Bäcker person
doctor doctors médecin médico Arzt person|sailor sailors marin marinero Seemann person
"""

# verb, past, gerund, third person, French infinitive
_VERBS = """
walk walked walking walks marcher|sing sang singing sings chanter|run ran running runs courir
write wrote writing writes écrire|see saw seeing sees voir|buy bought buying buys acheter
find found finding finds trouver|swim swam swimming swims nager|eat ate eating eats manger
drink drank drinking drinks boire|sleep slept sleeping sleeps dormir|speak spoke speaking speaks parler
take took taking takes prendre|give gave giving gives donner|come came coming comes venir
fall fell falling falls tomber|break broke breaking breaks casser|open opened opening opens ouvrir
close closed closing closes fermer|read read reading reads lire|think thought thinking thinks penser
bring brought bringing brings apporter|play played playing plays jouer|wait waited waiting waits attendre
laugh laughed laughing laughs rire|build built building builds construire|lose lost losing loses perdre
sell sold selling sells vendre|dance danced dancing dances danser|draw drew drawing draws dessiner
fly flew flying flies voler|hold held holding holds tenir|know knew knowing knows savoir
leave left leaving leaves partir|ride rode riding rides monter|throw threw throwing throws jeter
cook cooked cooking cooks cuisiner|paint painted painting paints peindre|carry carried carrying carries porter
teach taught teaching teaches enseigner
"""

# adjective, opposite, comparative, superlative, French, Spanish
_ADJECTIVES = """
big small bigger biggest grand grande|hot cold hotter hottest chaud caliente
long short longer longest long largo|fast slow faster fastest rapide rápido
old young older oldest vieux viejo|hard soft harder hardest dur duro
dark bright darker darkest sombre oscuro|high low higher highest haut alto
strong weak stronger strongest fort fuerte|rich poor richer richest riche rico
wet dry wetter wettest mouillé mojado|thick thin thicker thickest épais grueso
clean dirty cleaner cleanest propre limpio|full empty fuller fullest plein lleno
heavy light heavier heaviest lourd pesado|wide narrow wider widest large ancho
near far nearer nearest proche cercano|deep shallow deeper deepest profond profundo
loud quiet louder loudest bruyant ruidoso|early late earlier earliest tôt temprano
sweet sour sweeter sweetest doux dulce|cheap costly cheaper cheapest abordable barato
brave timid braver bravest courageux valiente|smooth rough smoother smoothest lisse liso
sharp blunt sharper sharpest pointu afilado|tall tiny taller tallest élevé elevado
new used newer newest neuf nuevo|warm cool warmer warmest tiède tibio
kind cruel kinder kindest gentil amable|safe risky safer safest sûr seguro
calm stormy calmer calmest calme tranquilo|fresh stale fresher freshest frais fresco
"""


def _rows(table: str) -> list[list[str]]:
    return [row.split() for line in table.strip().splitlines() for row in line.split("|")]


def _columns(table: str, names: str) -> dict[str, dict[str, str]]:
    rows = _rows(table)
    return {name: {r[0]: r[i + 1] for r in rows} for i, name in enumerate(names.split())}


def _first_letters(table: str) -> dict[str, str]:
    return {r[0]: r[0][0] for r in _rows(table)}


# task name -> {input word: output word}
TASKS: dict[str, dict[str, str]] = {
    **_columns(_NOUNS, "plural noun_to_french noun_to_spanish noun_to_german category"),
    "noun_first_letter": _first_letters(_NOUNS),
    **_columns(_VERBS, "past gerund third_person verb_to_french"),
    "verb_first_letter": _first_letters(_VERBS),
    **_columns(_ADJECTIVES, "opposite comparative superlative adjective_to_french "
                            "adjective_to_spanish"),
}

# Tasks of one family have the same input words: only the examples tell which task is meant.
FAMILIES: dict[str, list[str]] = {
    "nouns": ["plural", "noun_to_french", "noun_to_spanish", "noun_to_german", "category",
              "noun_first_letter"],
    "verbs": ["past", "gerund", "third_person", "verb_to_french", "verb_first_letter"],
    "adjectives": ["opposite", "comparative", "superlative", "adjective_to_french",
                   "adjective_to_spanish"],
}
