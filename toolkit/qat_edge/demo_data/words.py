"""Words for the slots of the example assistant's requests: times, names, places, things.

Each table has two halves without a common entry, one for training and one for evaluation, so that exact match is
measured on values the model was not trained on. Values are copied unchanged from the request into the tool call.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Halves:
    """Values or phrasings, split into two disjoint halves.

    Attributes:
        train: For training, the split "train".
        held_out: For evaluation, the split "eval".
    """

    train: tuple[str | int, ...]
    held_out: tuple[str | int, ...]

    def for_split(self, split: str) -> tuple[str | int, ...]:
        """Return the half of a split, "train" or "eval"."""
        return {"train": self.train, "eval": self.held_out}[split]


def words(train: str, held_out: str) -> Halves:
    """Make halves from two strings whose entries are separated by bars."""
    return Halves(
        tuple(w.strip() for w in train.split("|")),
        tuple(w.strip() for w in held_out.split("|")),
    )


def pairs(first: Halves, second: Halves) -> Halves:
    """Combine every first word with every second word, separately in each half."""
    return Halves(
        tuple(f"{a} {b}" for a in first.train for b in second.train),
        tuple(f"{a} {b}" for a in first.held_out for b in second.held_out),
    )


def numbers(values: range) -> Halves:
    """Hold out every fifth number."""
    return Halves(
        tuple(n for i, n in enumerate(values) if i % 5 != 3),
        tuple(n for i, n in enumerate(values) if i % 5 == 3),
    )


def _clock_times() -> Halves:
    """Hold out every seventh of the times of a day in steps of five minutes."""
    times = [f"{h}:{m:02d} {half}" for half in ("am", "pm") for h in range(1, 13) for m in range(0, 60, 5)]
    # 7 shares no factor with 12 or 24, so every hour and every minute occurs in both halves.
    return Halves(
        tuple(t for i, t in enumerate(times) if i % 7 != 4), tuple(t for i, t in enumerate(times) if i % 7 == 4)
    )


FIRST_NAMES = words(
    "Maya|Tom|Priya|Lucas|Hannah|Omar|Chloe|Daniel|Ingrid|Marco|Aisha|Peter|Yuki|Sofia|Ben|Nadia|Victor|Laura|Sam|Grace"
    "|Diego|Emma|Felix|Rosa|Kevin|Julia|Anton|Leila|Martin|Claire|Hugo|Ruth|Simon|Tara|Walter|Zoe",
    "Oliver|Fatima|Jonas|Beatrice|Ravi|Helen|Mateo|Ivy|Stefan|Carmen|Noah|Alice",
)
CONTACT = Halves(
    (*FIRST_NAMES.train, "Mum", "Dad", "Grandma", "Dr Patel", "Mrs Novak", "Mr Lindgren", "the plumber", "the office"),
    (*FIRST_NAMES.held_out, "Uncle Joe", "Dr Weber", "Mrs Okafor", "the dentist"),
)
TIME = _clock_times()
DAY = words("Monday|Tuesday|Thursday|Friday|Sunday|tomorrow", "Wednesday|Saturday|today")
DURATION = pairs(numbers(range(2, 60)), words("minutes|seconds", "minutes|seconds"))
PERCENT = numbers(range(5, 100))
CITY = words(
    "Paris|Berlin|Lisbon|Oslo|Madrid|Prague|Toronto|Chicago|Boston|Nairobi|Cairo|Tokyo|Seoul|Mumbai|Sydney|Lima|Geneva"
    "|Athens|Dublin|Warsaw|Helsinki|Denver|Kyoto|Naples|Hamburg|Bergen|Porto|Austin|Montreal|Zurich",
    "Vienna|Rome|Seattle|Bangkok|Bogota|Glasgow|Munich|Stockholm|Krakow|Lyon",
)
PLACE = words(
    "the airport|the train station|the nearest pharmacy|the city library|Central Park|the art museum|the harbour"
    "|the sports hall|the old market|12 Garden Street|48 Mill Road|5 Station Square|77 Oak Avenue|31 Church Lane"
    "|the science museum|the swimming pool|the town hall|the botanical garden|9 Harbour View|64 King Street",
    "the bus terminal|the nearest hospital|the opera house|the football stadium|23 River Street|86 Park Lane"
    "|the zoo|the south beach|17 Castle Hill|the concert hall",
)
MESSAGE = pairs(
    words(
        "I will be|we are going to be|the train is|dinner is|the meeting is|the flight is|the party is|the delivery is"
        "|my bus is|the class is|the show is|practice is",
        "the concert is|lunch is|the ferry is|my shift is|the interview is|the game is",
    ),
    words(
        "late|ten minutes late|almost over|ready now|right on time|starting soon|moved to Friday|cancelled"
        "|at the usual place|an hour later|nearly done|delayed again",
        "a bit early|about to begin|off for today|twenty minutes behind|back on track|going well",
    ),
)
TASK = pairs(
    words(
        "buy|pick up|return|order|clean|check|pack|bring|repair|replace|wrap|look for|pay for|drop off",
        "collect|wash|prepare|book|renew|measure",
    ),
    words(
        "the parcel|the tickets|the blue jacket|the library books|the car keys|the printer|the concert passes|the cake"
        "|the laundry|the tent|the bike tyre|the water filter|the birthday gift|the spare charger|the tax forms",
        "the curtains|the passports|the garden hose|the rental van|the guitar strings|the wedding suit",
    ),
)
EVENT = pairs(
    words(
        "team|budget|project|design|piano|yoga|planning|dental|book club|school|sales|training|parent|chess",
        "marketing|swimming|product|language|choir|garden",
    ),
    words("meeting|review|lesson|appointment|session|call|workshop", "check-in|rehearsal|interview|class"),
)
# Artists and titles are invented, so that none is known by heart.
ARTIST = pairs(
    words(
        "Silver|Paper|Velvet|Northern|Hollow|Electric|Broken|Golden|Midnight|Crystal|Wild|Lunar",
        "Copper|Distant|Marble|Scarlet",
    ),
    words("Foxes|Harbours|Lanterns|Rivers|Mirrors|Pilots|Echoes|Gardens", "Comets|Orchards|Sparrows|Towers"),
)
SONG = pairs(
    words(
        "Dancing|Falling|Waiting|Running|Drifting|Singing|Driving|Sleeping|Burning|Walking",
        "Floating|Shining|Climbing|Turning",
    ),
    words(
        "Slowly|in the Rain|under Neon Lights|to the Coast|without You|past Midnight|on Thin Ice|Home Again",
        "through Smoke|by the Lake|after Dawn|for Hours",
    ),
)
APP = words(
    "Calendar|Camera|Photos|Maps|Mail|Clock|Calculator|Podcasts|Files|Contacts|Wallet|Health|News|Notes|Gallery|Radio",
    "Weather|Settings|Translator|Recorder|Compass|Fitness",
)
PHRASE = pairs(
    words(
        "where is|how much is|I would like|please bring|I am looking for|can I see|do you have|how far is",
        "who owns|I need|when do you close|we lost",
    ),
    words(
        "the station|the menu|a glass of water|the exit|a table for two|the blue shirt|the next bus|the museum|a map",
        "the bill|a window seat|the red umbrella|the ferry port",
    ),
)
LANGUAGE = words(
    "French|Spanish|German|Italian|Japanese|Dutch|Swedish|Polish|Korean|Turkish|Greek|Danish",
    "Portuguese|Finnish|Arabic|Hindi|Czech",
)
AMOUNT = numbers(range(2, 400))
FROM_UNIT = words("miles|pounds|inches|gallons|cups|acres|yards", "ounces|feet|pints")
TO_UNIT = words("kilometres|kilograms|centimetres|litres|millilitres|hectares|metres", "grams|millimetres|decilitres")
NOTE = pairs(
    words(
        "the wifi password is|the locker code is|the new budget is|the gate number is|the paint colour is"
        "|the shoe size is|the room number is|the parking spot is|the best score is",
        "the door code is|the invoice number is|the hat size is|the seat number is",
    ),
    words(
        "4417|B12|sea green|42|nine hundred|A7|3090|dark blue|18 C|2256|level three|F9",
        "7731|C28|pale yellow|615|row eleven|D4",
    ),
)
QUERY = pairs(
    words(
        "how to bake|how to grow|the history of|the best way to store|pictures of|facts about|the price of|reviews of"
        "|how to draw|the origin of",
        "how to cook|the taste of|recipes with|where to find|how to choose",
    ),
    words(
        "sourdough bread|tomatoes|paper cranes|olive oil|electric bikes|green tea|wooden boats|mountain goats"
        "|blueberries|rye flour|bonsai trees|old maps",
        "red lentils|wild garlic|ginger|sea salt|chestnuts|sunflowers",
    ),
)
ITEM = words(
    "milk|eggs|bread|apples|rice|coffee beans|paper towels|dish soap|butter|bananas|oat flakes|pasta|batteries|onions"
    "|light bulbs|cat food|toothpaste|cheese|carrots|shampoo|lemons|yoghurt|spinach|candles",
    "tomato paste|honey|potatoes|washing powder|peanuts|cucumbers|tea bags|flour",
)
LIST = words("shopping|party|holiday|camping|hardware|kitchen", "picnic|grocery|weekend")
TOPIC = words(
    "science|football|the economy|space travel|health|cinema|politics|cycling|technology|farming|tennis|energy",
    "the climate|basketball|music|the stock market|education",
)
FOOD = words(
    "pizza|sushi|ramen|tacos|curry|burgers|pancakes|falafel|dumplings|noodles|vegan food|ice cream",
    "tapas|waffles|kebab|pho|seafood",
)
