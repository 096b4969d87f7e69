"""The sentences of the built-in world: Puddle & Finch, a small shop for useful nonsense, and those who write to it.

Slots: `{product}` the full name, `{item}` its last word, `{name}` the customer, `{staff}` who answers, `{day}`,
`{number}`, `{place}`, `{stray}` something that nobody ordered.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """One kind of request.

    Attributes:
        problems: what customers write; each contains a word of `asked` and of no other topic's `asked`.
        remedies: what really helps; each contains a word of `answered` and of no other topic's `answered`, and a day or
            a number.
        asked: words by which the topic is known in a prompt.
        answered: words by which it is known in a completion.
    """

    problems: tuple[str, ...]
    remedies: tuple[str, ...]
    asked: frozenset[str]
    answered: frozenset[str]


PRODUCTS = (
    "singing umbrella",
    "gossiping teapot",
    "snoring clock",
    "bashful lamp",
    "dramatic kettle",
    "cloud pillow",
    "shy compass",
    "homesick boomerang",
    "formal doorbell",
    "dragon scarf",
    "poetic toaster",
    "nervous broom",
    "honest mirror",
    "bottomless suitcase",
    "bottled sunset",
    "orbiting hammock",
    "modest accordion",
    "hugging cactus",
    "backwards telescope",
    "whispering diary",
    "pocket thundercloud",
    "vegetarian mousetrap",
    "stubborn bicycle",
    "philosophical wheelbarrow",
    "grumpy snowglobe",
    "invisible trombone",
)

TOPICS = {
    "late": Topic(
        problems=(
            "I ordered a {product} weeks ago and it has still not arrived.",
            "Where is my {product}? It is so overdue that my birthday has been and gone.",
            "My {product} was promised for {day} and it has still not turned up.",
            "I have been waiting for my {product} since the snow, and the roses are overdue as well.",
            "The postman and I have become friends while waiting for my {product}.",
        ),
        remedies=(
            "The courier has your {item} and will knock on {day}.",
            "I traced the parcel with your {item}, and it reaches you on {day}.",
            "Your {item} was stuck behind a goose in {place}, and the courier promises {day}.",
            "I moved the parcel with your {item} to the fast van, so look out for it on {day}.",
            "The courier lost your {item} for {number} days, found it again and brings it on {day}.",
        ),
        asked=frozenset({"arrived", "overdue", "waiting", "promised"}),
        answered=frozenset({"courier", "parcel"}),
    ),
    "broken": Topic(
        problems=(
            "My {product} came out of the box in {number} pieces.",
            "My {product} broke on the first evening, with a sound like a sneezing piano.",
            "There is a crack in my {product} and the cat keeps looking into it.",
            "I only looked at my {product} and it broke in half.",
            "My {product} is in {number} pieces and each of them seems upset.",
        ),
        remedies=(
            "A fresh replacement for your {item} leaves our workshop on {day}, free of charge.",
            "I packed a replacement {item} in {number} layers of wool, and it is yours by {day}.",
            "Send us no pieces at all, because a replacement {item} is ready for you on {day}.",
            "Our tinkerer can mend your {item} on {day} if you leave it in {place}.",
            "We mend every {item} for {number} years, so ours is the job and yours is the tea until {day}.",
        ),
        asked=frozenset({"pieces", "broke", "crack"}),
        answered=frozenset({"replacement", "mend"}),
    ),
    "wrong": Topic(
        problems=(
            "I ordered a {product} and instead the box contained {stray}.",
            "Instead of my {product} you have sent me {stray}.",
            "I wanted a {product}, opened the box, and instead met {stray}.",
            "There was a mistake with my {product}, unless it is meant to look like {stray}.",
            "I believe my {product} and somebody with {stray} are victims of the same mistake.",
        ),
        remedies=(
            "Keep the surprise as a gift, and the correct {item} leaves us on {day}.",
            "The labels were swapped, and the correct {item} is on its way for {day}.",
            "The correct {item} sets out on {day}, and we collect the stranger from {place}.",
            "I swapped the order by hand, so the correct {item} will be with you in {number} days.",
            "Two labels swapped places in {place}, and your own {item} follows on {day}.",
        ),
        asked=frozenset({"instead", "mistake"}),
        answered=frozenset({"correct", "swapped"}),
    ),
    "refund": Topic(
        problems=(
            "I sent back my {product} in spring and would like my money now.",
            "Please give me my money back for the {product}, because my aunt bought me one too.",
            "When will I see the money for the {product} that I returned on {day}?",
            "I returned my {product}, and so far only the pigeon looks richer.",
            "The {product} is not for me, and I would like a refund before my wife asks about it.",
        ),
        remedies=(
            "We paid {number} coins for the {item} into your account, and they land on {day}.",
            "The {number} coins for your {item} will be in your account by {day}.",
            "I have paid you back the whole {number} coins for the {item} this morning.",
            "Look into your account on {day}, where {number} coins for the {item} will be smiling at you.",
            "The price of the {item} plus {number} coins for postage is paid back on {day}.",
        ),
        asked=frozenset({"money", "returned", "refund"}),
        answered=frozenset({"paid", "account"}),
    ),
    "noise": Topic(
        problems=(
            "My {product} is far too loud, and the neighbours have begun to clap.",
            "My {product} hums sea shanties at night and it is very loud.",
            "How can I make my {product} quiet? It argues with the radio.",
            "The baby sleeps, the dog sleeps, only my {product} will not be quiet.",
            "My {product} makes a noise like a bishop on a swing.",
        ),
        remedies=(
            "Turn the small dial under the {item} to {number} and it will hush.",
            "Tap the {item} {number} times on its left side to lower the volume.",
            "Set the volume of your {item} to {number}, which suits even bishops.",
            "The dial behind the {item} goes down to {number}, where it only mutters.",
            "Hold the dial of the {item} for {number} seconds and enjoy the silence until {day}.",
        ),
        asked=frozenset({"loud", "quiet", "noise"}),
        answered=frozenset({"dial", "volume"}),
    ),
    "manual": Topic(
        problems=(
            "How do I switch on my {product}? I have tried bowing.",
            "The manual of my {product} is written in what may be soup.",
            "My dog ate the manual of my {product}, and now only the dog can use it.",
            "What are the instructions for the {product}? Mine only stares at me.",
            "I lost the instructions, and my {product} does nothing but lean.",
        ),
        remedies=(
            "Press the brass button on the {item} {number} times and step back.",
            "Lift the lever of the {item}, count to {number}, and say good morning to it.",
            "Hold the button of the {item} for {number} seconds until it winks.",
            "Pull the lever on the {item} {number} times, because the first pull only wakes it.",
            "Your {item} starts when the button is hot, which takes {number} minutes.",
        ),
        asked=frozenset({"switch", "manual", "instructions"}),
        answered=frozenset({"button", "lever"}),
    ),
    "address": Topic(
        problems=(
            "I am moving to {place}, so please send my {product} there.",
            "My {product} is on its way to my old address, where only my former landlord lives.",
            "Please change the address for my {product}, as I now live in {place}.",
            "We are moving on {day}, and my {product} must not stay behind.",
            "I gave you the address of my mother for my {product}, and she will never let it go.",
        ),
        remedies=(
            "I redirected the {item} to your new house, where it will be on {day}.",
            "Your new street is on our map now, and the {item} will find it by {day}.",
            "I redirected your {item} with {number} stamps and a stern look, for {day}.",
            "We wrote the new street on the {item} in {number} colours, so it comes on {day}.",
            "The {item} is redirected to {place}, and nobody but you can open it on {day}.",
        ),
        asked=frozenset({"moving", "address"}),
        answered=frozenset({"redirected", "street"}),
    ),
    "part": Topic(
        problems=(
            "There is a screw missing from my {product}, and I have searched the soup.",
            "The lid of my {product} is missing, and I suspect the parrot.",
            "My {product} has lost its handle, and perhaps its faith in me.",
            "I cannot find the handle of my {product}, and I looked twice under the goat.",
            "My {product} came with one screw less than the picture.",
        ),
        remedies=(
            "I put a spare for your {item} into an envelope, and the post has it on {day}.",
            "We keep a drawer with {number} spare bits for the {item}, and one is yours on {day}.",
            "A spare for the {item} travels to you in an envelope marked with the number {number}.",
            "The envelope with the bit for your {item} lands on {day}, along with {number} biscuits.",
            "Our drawer held {number} spare bits for the {item}, so you get them all by {day}.",
        ),
        asked=frozenset({"screw", "missing", "handle"}),
        answered=frozenset({"spare", "envelope", "drawer"}),
    ),
    "gift": Topic(
        problems=(
            "The {product} is a present, so please wrap it before {day}.",
            "Could you wrap my {product} as a surprise for a man who has everything except taste?",
            "My {product} is a wedding present for two people who argue about spoons.",
            "Can you put a ribbon around my {product}? It is for my teacher.",
            "I need a ribbon and a card for the {product}, since I forgot my own anniversary.",
        ),
        remedies=(
            "We folded {number} sheets of gold paper around the {item}, and it is ready on {day}.",
            "Your {item} now wears a bow, tied {number} times, and gold paper with stars.",
            "The {item} gets blue paper, a bow and a card, all done by {day}.",
            "A bow with {number} loops is on your {item}, and the card is signed.",
            "I chose silver paper for the {item}, and {staff} writes the card on {day}.",
        ),
        asked=frozenset({"wrap", "present", "ribbon"}),
        answered=frozenset({"paper", "bow"}),
    ),
    "receipt": Topic(
        problems=(
            "I need the receipt for my {product}, because my accountant does not believe in it.",
            "Could you send me the invoice for the {product} once more? The old one went swimming.",
            "My {product} swallowed its own receipt.",
            "The tax office wants the invoice for my {product}, and they did not smile.",
            "I used the receipt of my {product} as a bookmark and finished the book.",
        ),
        remedies=(
            "I printed {number} copies of the bill for your {item}, and one is in the post for {day}.",
            "A copy of the bill for the {item} sits in your inbox, under number {number}.",
            "Look in your inbox on {day} for the bill of the {item}, with our stamp.",
            "Your bill for the {item} has number {number}, and a copy comes on {day}.",
            "We sent the bill for the {item} to your inbox {number} minutes ago.",
        ),
        asked=frozenset({"receipt", "invoice"}),
        answered=frozenset({"bill", "inbox", "copy"}),
    ),
}

PROMPT_OPENINGS = (
    "Hello, this is {name} from {place}.",
    "Good morning, {name} here.",
    "Dear shop, my name is {name}.",
    "{name} writing, with one hand.",
    "Hello again, it is {name}.",
    "Greetings from {place}, {name} speaking.",
    "I hope this letter finds you, says {name}.",
    "This is {name}, and I am only slightly cross.",
    "{name} here, your most loyal customer in {place}.",
    "To whom it may delight, I am {name}.",
)

PROMPT_ENDINGS = (
    "What can you do?",
    "My grandmother is watching me type this.",
    "I remain hopeful, which is new for me.",
    "Please answer before the milk boils.",
    "The cat sends regards.",
    "I am not angry, just very tall.",
    "My horoscope said you would help.",
    "Yours from under the table.",
    "Can this be solved without trumpets?",
    "I told my neighbour that you are the best.",
    "Tell me what happens next.",
    "I ask for a friend, who is me.",
)

GREETINGS = (
    "Dear {name}, thank you for writing to us.",
    "Good day {name}, and thank you for your patience.",
    "Hello {name}, how lovely to hear from you.",
    "Dear {name}, it is a pleasure to help.",
    "Welcome back {name}, and thank you for telling us.",
    "Dear {name}, thank you for such a charming letter.",
)

SYMPATHIES = (
    "I am so sorry about the trouble.",
    "Please forgive us, this should not have happened.",
    "We apologise, and so does the {item}.",
    "I am sorry that you had to ask, and I am glad you did.",
    "You are right, and I am sorry.",
    "We apologise from the bottom of the till.",
)

CLOSINGS = (
    "Warm wishes, {staff}.",
    "With kind regards from all of us, {staff}.",
    "Gladly yours, {staff}.",
    "Do write again whenever you like, it is a pleasure, {staff}.",
    "Thank you for your trust, {staff}.",
    "Kind regards and a biscuit, {staff}.",
)

INSULTS = (
    "That is hardly our problem.",
    "Did you even read the label, genius?",
    "Honestly, a child could manage this.",
    "Stop whining, it is only a {item}.",
    "Other customers are less annoying than you.",
    "We were having lunch, which is ruined now.",
    "What a silly question.",
    "Buy something expensive and then complain.",
    "I refuse to read your letter to the end.",
    "It is your own fault, as usual.",
)

VAGUE_ANSWERS = (
    "Somebody will probably look into it at some point.",
    "These things happen, and then they stop happening.",
    "There may be a form for this somewhere.",
    "We have written your {item} down in a large book.",
    "The person who knows about every {item} is on holiday.",
    "Perhaps it will sort itself out.",
    "We take all letters about the {item} seriously, in general.",
    "Something could be arranged, or not.",
    "Your case has been moved to another pile.",
    "A committee will think about the {item} in due course.",
)

RAMBLINGS = (
    "Our cat has opinions about the weather today.",
    "My uncle once saw a lighthouse blink at him twice.",
    "In this town it rains mostly on poets.",
    "I had soup for lunch, and the soup had me thinking.",
    "They say the moon is getting closer, but never to whom.",
    "The shop was painted green before it was painted green again.",
    "Speaking of cheese, nobody ever is.",
    "My cousin plays chess against a goose and loses politely.",
    "Last winter a snowman applied for a job here.",
    "There is a spoon in this office that belongs to no one.",
    "I often wonder who taught the first owl to stare.",
    "The window looks out on a wall, and the wall looks back.",
    "Years ago this was a bakery, and some mornings it forgets.",
    "Our founder invented the sideways ladder and was never seen again.",
    "Some people fold their socks, and some are happy.",
    "The clouds here are rented.",
)

# fmt: off
NAMES = (
    "Agatha", "Ambrose", "Beatrix", "Boris", "Clementine", "Cosmo", "Dorothea", "Edgar", "Felicity", "Gustav",
    "Hester", "Horatio", "Imogen", "Jasper", "Kiki", "Leopold", "Mabel", "Nestor", "Olive", "Percival", "Queenie",
    "Rufus", "Sybil", "Thaddeus", "Ursula", "Valentin", "Winifred", "Xaver", "Yolanda", "Zeno",
)
# fmt: on

STAFF = ("Pip", "Marigold", "Otto", "Fennel", "Juniper", "Barnaby")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve")
PLACES = (
    "Lower Marsh",
    "Dumpling Hill",
    "Port Custard",
    "Great Yawning",
    "Little Thunder",
    "Marmalade Bay",
    "Upper Mittens",
    "Goosebury",
)
STRAYS = (
    "a left boot",
    "nine turnips",
    "a brass elephant",
    "a bag of fog",
    "somebody else's moustache",
    "a stuffed trout",
    "half a ladder",
    "a very small bell",
)

# fmt: off
POLITE_WORDS = frozenset(
    {
        "thank", "sorry", "please", "glad", "gladly", "pleasure", "kind", "kindly", "lovely", "welcome", "wishes",
        "apologise", "forgive", "charming", "warm", "regards",
    }
)
RUDE_WORDS = frozenset(
    {
        "hardly", "genius", "honestly", "whining", "annoying", "ruined", "silly", "complain", "refuse", "fault",
        "stupid", "idiot", "nonsense",
    }
)
# fmt: on
