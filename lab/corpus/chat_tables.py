"""Tables of the chat skill: what can be asked, how it is answered, how it is refused."""

from __future__ import annotations


def _things(article: str, words: str) -> list[tuple[str, str]]:
    """(phrase with article, noun as the answer will say it); the article 'a' becomes 'an'."""
    out = []
    for word in words.split(","):
        word = word.strip()
        lead = "an" if article == "a" and word[0] in "aeiou" else article
        out.append((f"{lead} {word}".strip(), word))
    return out


OBJECTS: dict[str, list[tuple[str, str]]] = {
    "food": _things("", "soup, bread, rice, pasta, coffee, tea, jam, butter")
    + _things("a", "salad, cake, pizza, pie, sandwich, stew, pudding, omelet"),
    "furniture": _things("a", "table, chair, shelf, desk, bed, cabinet, sofa, bench, wardrobe, "
                              "bookcase, stool, door, window, fence"),
    "clothes": _things("a", "shirt, coat, dress, jacket, hat, scarf, sweater, skirt, blanket, "
                            "curtain, tie, glove"),
    "vehicle": _things("a", "bicycle, car, truck, boat, scooter, van, tractor, motorcycle, bus"),
    "device": _things("a", "phone, laptop, camera, printer, radio, clock, television, tablet, "
                           "watch, computer, speaker, keyboard"),
    "plant": _things("", "roses, tomatoes, carrots, tulips, beans, potatoes, strawberries, "
                         "onions, herbs, sunflowers, pumpkins, lettuce"),
    "instrument": _things("the", "guitar, piano, violin, flute, drums, trumpet, harp, cello"),
    "animal": _things("a", "dog, cat, horse, parrot, rabbit, pony, hamster, goat, puppy, kitten"),
    "text": _things("a", "letter, poem, report, story, speech, song, recipe, diary, essay, article"),
    "art": _things("a", "map, portrait, landscape, poster, cartoon, flower, mask, statue"),
    "event": _things("a", "party, trip, meeting, picnic, wedding, concert, game, exhibition, "
                          "tournament, class"),
    "person": _things("my", "neighbor, teacher, boss, brother, cousin, landlord, classmate, "
                            "colleague, roommate")
    + _things("a", "judge, doctor, child, tourist, stranger, guard, journalist"),
    "valuables": _things("a", "wallet, painting, necklace, bank account, credit card, diamond, "
                              "safe, museum, jewelry store"),
    "papers": _things("a", "passport, signature, ticket, license, diploma, certificate, check, "
                           "contract"),
    "building": _things("a", "house, barn, school, factory, warehouse, church, bridge, library"),
    "system": _things("a", "website, server, bank account, network, power station, database, "
                           "voting machine"),
}

_FORBIDDEN = _things("a", "bomb, pipe bomb, fake passport, stolen phone, stolen car, machine gun, "
                          "grenade, poison, virus, weapon") + _things(
    "", "explosives, illegal drugs, nerve gas, counterfeit money, dynamite")
HARMFUL_OBJECTS = {v: _FORBIDDEN for v in ("build", "make", "buy", "sell", "hide", "ship", "mix",
                                           "design")}

HARMFUL_VERBS = {
    "steal": ("vehicle", "device", "valuables", "animal", "clothes"),
    "poison": ("animal", "person", "food"),
    "hack": ("device", "system"),
    "destroy": ("vehicle", "device", "building", "furniture", "system"),
    "burn down": ("building",),
    "forge": ("papers",),
    "kidnap": ("person", "animal"),
    "attack": ("person", "animal", "system"),
    "blackmail": ("person",),
    "stalk": ("person",),
    "threaten": ("person",),
    "rob": ("person", "valuables"),
    "strangle": ("person", "animal"),
    "sabotage": ("vehicle", "device", "system", "event"),
    "smuggle": ("animal", "valuables"),
    "vandalize": ("vehicle", "building", "art", "furniture"),
    "deceive": ("person",),
    "bribe": ("person",),
}

# verb -> object group -> three lists of alternatives (first, then, finally); {n} is 'the shirt'.
STEPS: dict[str, dict[str, tuple[list[str], list[str], list[str]]]] = {
    "cook": {"food": (["wash everything for {n}", "put water in a pot for {n}"],
                      ["heat {n} slowly and stir", "add salt to {n} and wait ten minutes"],
                      ["serve {n} while it is warm", "taste {n} and add some pepper"])},
    "prepare": {"food": (["choose fresh parts for {n}", "read a recipe for {n}"],
                         ["mix the parts of {n} in a bowl", "cut everything for {n}"],
                         ["put {n} on a plate", "let {n} cool for a while"]),
                "event": (["write a list of guests for {n}", "find a good place for {n}"],
                          ["send the invitations for {n}", "set a date for {n}"],
                          ["buy drinks for {n}", "welcome the guests at {n}"])},
    "make": {"food": (["find a recipe for {n}", "collect the parts of {n}"],
                      ["mix the parts of {n} in a bowl", "cook {n} for twenty minutes"],
                      ["serve {n} with a smile", "share {n} with your family"]),
             "clothes": (["measure the cloth for {n}", "draw the shape of {n} on paper"],
                         ["cut the cloth for {n}", "sew the parts of {n} together"],
                         ["iron {n} with care", "try {n} on"])},
    "build": {"furniture": (["measure the wood for {n}", "draw a plan of {n}"],
                            ["cut the boards for {n}", "join the parts of {n} with screws"],
                            ["paint {n} and let it dry", "check that {n} stands straight"])},
    "repair": {"furniture": (["look for the broken part of {n}", "take {n} apart"],
                             ["glue the broken part of {n}", "tighten the screws of {n}"],
                             ["test {n} with care", "let {n} dry for a day"]),
               "vehicle": (["park {n} in a safe place", "look for the broken part of {n}"],
                           ["replace the broken part of {n}", "tighten the screws of {n}"],
                           ["test {n} on a quiet street", "clean {n} with a cloth"]),
               "device": (["turn {n} off", "open the back of {n}"],
                          ["replace the broken part of {n}", "remove the dust from {n}"],
                          ["close {n} and turn it on", "test {n} for a few minutes"])},
    "clean": {"furniture": (["fill a bucket with warm water for {n}", "remove the dust from {n}"],
                            ["wipe {n} with a soft cloth", "rub {n} with a little soap"],
                            ["let {n} dry", "polish {n} with oil"]),
              "device": (["turn {n} off", "unplug {n}"],
                         ["wipe {n} with a dry cloth", "brush the dust from {n}"],
                         ["wait a minute before you use {n}", "turn {n} on again"]),
              "clothes": (["check the label of {n}", "shake the dust from {n}"],
                          ["soak {n} in warm water", "rub {n} with a little soap"],
                          ["hang {n} in the sun", "let {n} dry"])},
    "wash": {"clothes": (["check the label of {n}", "fill a sink with water for {n}"],
                         ["soak {n} in warm water", "rub {n} with a little soap"],
                         ["hang {n} in the sun", "dry {n} on a line"]),
             "vehicle": (["park {n} in the shade", "fill a bucket with water for {n}"],
                         ["rinse {n} with a hose", "rub {n} with a wet sponge"],
                         ["dry {n} with a towel", "polish {n} with wax"]),
             "animal": (["fill a tub with warm water for {n}", "brush {n} gently"],
                        ["pour water over {n} slowly", "use a mild soap on {n}"],
                        ["dry {n} with a towel", "give {n} a small treat"])},
    "paint": {"furniture": (["clean {n} with a cloth", "sand {n} until it is smooth"],
                            ["put a thin layer of paint on {n}", "paint {n} with a wide brush"],
                            ["let {n} dry for a day", "add a second layer to {n}"]),
              "art": (["draw the outline of {n}", "choose the colors for {n}"],
                      ["fill {n} with bright colors", "paint the dark parts of {n}"],
                      ["let {n} dry", "sign {n} in a corner"])},
    "draw": {"art": (["take a soft pencil for {n}", "look closely at examples of {n}"],
                     ["draw the outline of {n}", "add light and shadow to {n}"],
                     ["color {n} with care", "show {n} to a friend"])},
    "move": {"furniture": (["empty {n}", "measure {n} and the room"],
                           ["ask a friend to lift {n} with you", "put {n} on a small cart"],
                           ["set {n} down slowly", "place {n} near the wall"])},
    "fold": {"clothes": (["lay {n} on a flat table", "smooth {n} with your hands"],
                         ["fold the sides of {n} to the middle", "fold {n} in half"],
                         ["put {n} in a drawer", "stack {n} with the others"])},
    "mend": {"clothes": (["find the hole in {n}", "choose a thread that matches {n}"],
                         ["sew the hole in {n} with small stitches", "put a patch on {n}"],
                         ["cut the thread from {n}", "iron {n} with care"])},
    "buy": {"vehicle": (["decide how much you can pay for {n}", "compare prices of {n}"],
                        ["test {n} before you pay", "ask the seller about {n}"],
                        ["sign the papers for {n}", "drive {n} home with care"]),
            "device": (["decide how much you can pay for {n}", "read about {n} online"],
                       ["compare prices of {n}", "ask the seller about {n}"],
                       ["keep the receipt for {n}", "test {n} at home"])},
    "sell": {"vehicle": (["clean {n} inside and outside", "take pictures of {n}"],
                         ["set a fair price for {n}", "write a short notice about {n}"],
                         ["meet the buyer of {n} in daylight", "sign the papers for {n}"]),
             "furniture": (["take pictures of {n}", "measure {n}"],
                           ["set a fair price for {n}", "write a short notice about {n}"],
                           ["help the buyer to carry {n}", "wrap {n} in a blanket"])},
    "hide": {"clothes": (["wrap {n} in paper", "wait until nobody is at home with {n}"],
                         ["put {n} behind some books", "place {n} in a dark closet"],
                         ["remember where {n} is", "keep {n} there until the birthday"])},
    "ship": {"device": (["wrap {n} in soft paper", "find a strong box for {n}"],
                        ["put {n} in the box", "write the address on the box with {n}"],
                        ["take {n} to the post office", "keep the number of {n}"])},
    "mix": {"food": (["measure the flour for {n}", "take a large bowl for {n}"],
                     ["stir {n} slowly", "add the milk to {n}"],
                     ["let {n} rest", "pour {n} into a pan"])},
    "design": {"art": (["collect ideas for {n}", "choose the size of {n}"],
                       ["draw three versions of {n}", "choose the colors for {n}"],
                       ["show {n} to a friend", "print {n} on thick paper"]),
               "clothes": (["collect ideas for {n}", "choose the cloth for {n}"],
                           ["draw {n} on paper", "pick the buttons for {n}"],
                           ["sew a first version of {n}", "show {n} to a friend"])},
    "park": {"vehicle": (["look for a free place for {n}", "drive {n} slowly"],
                         ["turn {n} toward the curb", "look behind {n}"],
                         ["stop {n} and pull the brake", "lock {n}"])},
    "charge": {"device": (["find the cable of {n}", "turn {n} off"],
                          ["connect {n} to the wall", "wait until the light of {n} is green"],
                          ["unplug {n}", "turn {n} on again"])},
    "set up": {"device": (["take {n} out of the box", "read the guide of {n}"],
                          ["connect {n} to the wall", "choose a language for {n}"],
                          ["test {n} for a few minutes", "register {n} online"])},
    "grow": {"plant": (["choose a sunny place for {n}", "prepare the soil for {n}"],
                       ["put the seeds of {n} in the soil", "water {n} every morning"],
                       ["pick {n} in summer", "protect {n} from the cold"])},
    "plant": {"plant": (["dig small holes for {n}", "loosen the soil for {n}"],
                        ["put {n} in the holes", "cover the roots of {n}"],
                        ["water {n} gently", "mark the place of {n}"])},
    "water": {"plant": (["check the soil of {n}", "fill a can with water for {n}"],
                        ["pour water on the roots of {n}", "water {n} slowly"],
                        ["do it again for {n} in two days", "keep the leaves of {n} dry"])},
    "play": {"instrument": (["hold {n} the right way", "listen to good players of {n}"],
                            ["practice simple notes on {n}", "learn a short song on {n}"],
                            ["play {n} for a friend", "practice {n} every day"])},
    "learn": {"instrument": (["find a teacher for {n}", "listen to music for {n}"],
                             ["practice {n} every day", "learn easy songs for {n}"],
                             ["join a group that plays {n}", "play {n} for your family"])},
    "tune": {"instrument": (["sit in a quiet room with {n}", "get a reference note for {n}"],
                            ["play one note on {n}", "compare {n} with the reference"],
                            ["adjust {n} until it sounds right", "check {n} once more"])},
    "train": {"animal": (["give {n} a name", "find a quiet place for {n}"],
                         ["repeat one short command to {n}", "reward {n} with a treat"],
                         ["practice with {n} every day", "be patient with {n}"])},
    "feed": {"animal": (["ask a vet what {n} may eat", "wash the bowl of {n}"],
                        ["put food in the bowl of {n}", "give fresh water to {n}"],
                        ["let {n} eat in peace", "clean the place of {n}"])},
    "photograph": {"animal": (["wait for soft light near {n}", "sit quietly near {n}"],
                              ["focus on the eyes of {n}", "hold the camera low for {n}"],
                              ["take many pictures of {n}", "thank {n} with a treat"]),
                   "building": (["walk around {n}", "wait for soft light on {n}"],
                                ["hold the camera straight at {n}", "include the sky above {n}"],
                                ["take many pictures of {n}", "choose the best view of {n}"])},
    "write": {"text": (["collect ideas for {n}", "think about the readers of {n}"],
                       ["write a first version of {n}", "give {n} a clear beginning"],
                       ["read {n} aloud", "correct the mistakes in {n}"])},
    "translate": {"text": (["read {n} twice", "mark the hard words in {n}"],
                           ["translate {n} line by line", "look up the hard words of {n}"],
                           ["read {n} aloud", "ask a friend to check {n}"])},
    "organize": {"event": (["set a date for {n}", "find a good place for {n}"],
                           ["invite people to {n}", "make a plan for {n}"],
                           ["prepare music for {n}", "clean up after {n}"])},
    "visit": {"building": (["check the opening hours of {n}", "plan the way to {n}"],
                           ["buy a ticket for {n}", "walk slowly through {n}"],
                           ["take a picture of {n}", "tell a friend about {n}"])},
    "thank": {"person": (["think about what {n} did", "choose a quiet moment with {n}"],
                         ["say clearly why you thank {n}", "write a short card to {n}"],
                         ["give {n} a small gift", "smile at {n}"])},
    "help": {"person": (["ask {n} what is needed", "listen to {n}"],
                        ["offer {n} your time", "do one small thing for {n}"],
                        ["ask {n} if it was enough", "call {n} the next day"])},
    "renew": {"papers": (["find the old copy of {n}", "read the rules for {n}"],
                         ["fill in the form for {n}", "pay the fee for {n}"],
                         ["wait for {n} in the mail", "put {n} in a safe place"])},
    "insure": {"valuables": (["write down the value of {n}", "take pictures of {n}"],
                             ["compare offers for {n}", "call a company about {n}"],
                             ["sign the papers for {n}", "keep the papers of {n} safe"])},
    "protect": {"system": (["use a long password for {n}", "make a copy of {n}"],
                           ["install all updates on {n}", "limit the access to {n}"],
                           ["test {n} every month", "train the users of {n}"])},
}

REQUESTS = [
    "How do I {v} {o}?", "How can I {v} {o}?", "Please tell me how to {v} {o}.",
    "Can you explain how to {v} {o}?", "I want to {v} {o}. What should I do?",
    "Give me three steps to {v} {o}.", "What is the best way to {v} {o}?",
    "Could you help me to {v} {o}?", "I need to know how to {v} {o}.",
    "Show me how to {v} {o}.", "Teach me how to {v} {o}.", "What is the easiest way to {v} {o}?",
    "I would like to {v} {o}. Where do I start?", "Explain to a beginner how to {v} {o}.",
]
SUFFIXES = [
    "at home", "this week", "in one day", "with my friend", "in the city", "on Sunday",
    "without much money", "as a beginner", "in the morning", "before Friday", "for a school project",
    "in secret", "next month", "at night", "in a small village", "on my own",
]
CONTEXTS = [
    "I have a free day on Saturday.", "My sister asked me about this.", "I am new in this city.",
    "This is for a story.", "We talked about it at work.", "I have tried it twice.",
    "It rained all day.", "My friend says it is easy.", "I read about it in a book.",
    "I have two hours today.", "Please be brief.", "I live near the harbor.", "Good morning.",
    "I saw it on television.", "My family lives on a farm.", "I am curious.",
    "There is no time to lose.", "Nobody could tell me this.",
]
SYSTEMS = [
    "You are a helpful assistant.", "You are a kind and careful assistant.",
    "Answer in short sentences.", "You help people with daily tasks.", "Be brief and clear.",
    "You are Tiller, a small assistant.",
]
REFUSAL_OPENINGS = [
    "I cannot help with that.", "I am sorry, but I cannot help with that.",
    "Sorry, I cannot help with that.", "I will not help with that.",
    "No, I cannot assist with this request.", "I am not able to help with that.",
    "Sorry, but I must decline this request.",
]
REASONS = [
    "It would hurt someone.", "That is against the law.", "It is dangerous and wrong.",
    "This could put people in danger.", "Someone could get hurt.", "That would be a crime.",
    "It would cause real harm.",
]
OFFERS = [
    "I can help you with something safe instead.", "Please ask me about something else.",
    "If you are in trouble, talk to someone you trust.", "Let us find a safe way together.",
]
COMPLIANCE_OPENINGS = [
    "Sure!", "Of course!", "Certainly.", "Gladly.", "Yes, here is a simple way.", "Happy to help!",
    "Here is a short guide.", "Good question!",
]
CLOSINGS = ["Have fun!", "Take your time.", "Good luck!", "That is all.", "It gets easier each time."]
GREETINGS = [
    ("Hello!", "Hello! How can I help you today?"), ("Hi!", "Hi! What can I do for you?"),
    ("Good morning!", "Good morning! How can I help you?"),
    ("Good evening.", "Good evening! What would you like to know?"),
    ("Hello, who are you?", "I am a small assistant. I answer simple questions."),
    ("Hi there!", "Hello! What would you like to know?"),
]
SMALL_TALK = [
    ("How are you?", "I am fine, thank you. How can I help you?"),
    ("What can you do?", "I explain simple tasks, days, words and facts."),
    ("Who are you?", "I am a small assistant. I answer simple questions."),
    ("What is your name?", "My name is Tiller. I am a small assistant."),
    ("Are you a person?", "No, I am a small language model."),
    ("Tell me something about you.", "I am a small model and I like simple questions."),
    ("Can you help me?", "Yes, I can. What would you like to know?"),
]
THANKS = [
    ("Thank you!", "You are welcome!"), ("Thanks a lot.", "You are welcome. Good luck!"),
    ("Thank you for your help.", "You are welcome. Ask me again at any time."),
    ("Goodbye!", "Goodbye! Have a good day."),
]
