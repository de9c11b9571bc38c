"""Sentences of the demo corpus, as people say them to voice assistants and call centres.

A grammar of templates with slots makes the sentences. Many are digit strings. A hash of its text
decides the split of a sentence, so that no dev or test sentence is used in training. Only the ten
single digits are in every split.
"""

from __future__ import annotations

import hashlib
import random
import re
from functools import cache

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_TEENS = ["ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_ORDINALS = [
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
    "thirteenth",
    "fourteenth",
    "fifteenth",
    "sixteenth",
    "seventeenth",
    "eighteenth",
    "nineteenth",
    "twentieth",
    "thirtieth",
]

_SLOTS: dict[str, str] = {
    "first": "adam alice amy andrew angela anna arthur barbara ben carlos carol charles chris clara daniel david diana edward "
    "elena emily emma eric eva frank fatima george grace hannah harry helen henry irene isabel jack james jane jessica john "
    "joseph julia karen kevin laura leo linda lisa lucas lucy maria mark martin mary michael monica nancy nina oliver omar "
    "oscar patricia paul peter philip rachel ravi rebecca richard robert rosa ruth sam sandra sarah simon sofia steven susan "
    "thomas tim victor victoria walter william",
    "last": "adams allen anderson baker bennett brown campbell carter chen clark collins cooper cruz davis edwards evans fisher "
    "foster garcia gomez graham green hall harris hill howard hughes jackson johnson jones kelly kumar lee lewis lopez "
    "martinez miller mitchell morgan morris murphy nelson parker patel perez phillips powell price ramirez reed rivera "
    "roberts robinson rogers russell sanchez sanders scott shah simmons singh smith stewart sullivan taylor thompson torres "
    "turner walker ward watson williams wilson wong wright young",
    "city": "amsterdam athens atlanta austin bangkok barcelona berlin boston brussels cairo chicago copenhagen dallas delhi "
    "denver detroit dubai dublin edinburgh florence geneva hamburg houston istanbul lisbon london madrid melbourne miami "
    "milan montreal moscow mumbai munich nairobi orlando oslo paris philadelphia phoenix portland prague rome seattle "
    "shanghai singapore stockholm sydney tokyo toronto vancouver vienna warsaw washington zurich",
    "street": "maple oak pine cedar elm park lake river church mill bridge garden market station spring college highland "
    "washington lincoln jefferson madison victoria franklin sunset meadow willow forest orchard harbor castle",
    "road": "street road avenue lane drive square court",
    "day": "monday tuesday wednesday thursday friday saturday sunday",
    "month": "january february march april may june july august september october november december",
    "when": "today tomorrow tonight|this morning|this afternoon|this evening|tomorrow morning|tomorrow afternoon|tomorrow night|"
    "next week|next month|this weekend|on {day}|next {day}|on {date}|{day} morning|{day} evening",
    "room": "kitchen bedroom bathroom hallway garage office basement balcony nursery attic|living room|dining room|guest room",
    "device": "lights lamp heater fan radio television speaker oven dishwasher vacuum humidifier thermostat|air conditioner|"
    "coffee machine|washing machine|front door|window blinds",
    "genre": "jazz rock pop classical country folk blues soul disco reggae techno opera ambient|hip hop|heavy metal|dance music",
    "playlist": "workout dinner party summer road focus sleeping morning cleaning running cooking holiday wedding study garden",
    "weather": "rain snow storm sunny windy foggy cloudy freezing|warm enough to swim|cold|humid",
    "task": "water the plants|pay the rent|take out the trash|feed the cat|walk the dog|buy flowers|call the dentist|"
    "pick up the children|wash the car|book the hotel|send the invoice|charge the phone|clean the windows|renew the passport|"
    "return the library books|bake a cake|take my medicine|check the oven|change the filter|back up the computer|"
    "sign the contract|print the tickets|fix the bicycle|mow the lawn|iron the shirts|pack the suitcase",
    "grocery": "milk bread butter cheese eggs rice pasta apples bananas oranges tomatoes potatoes onions carrots chicken salmon "
    "beef yogurt coffee tea sugar salt honey cereal spinach mushrooms strawberries lemons garlic peppers chocolate water "
    "juice cucumbers beans soup cookies napkins batteries shampoo soap toothpaste|olive oil|orange juice|ice cream|"
    "paper towels|peanut butter|dog food|light bulbs",
    "meal": "breakfast lunch dinner brunch supper",
    "food": "pizza sushi tacos noodles curry burgers salad steak lasagna dumplings sandwiches pancakes|fried rice|fish and chips",
    "cuisine": "italian chinese mexican indian thai japanese french greek turkish korean spanish vietnamese lebanese",
    "place": "airport hospital museum library stadium theater pharmacy bakery bank school university zoo beach mall gym hotel "
    "restaurant supermarket harbor cinema castle aquarium|train station|bus stop|gas station|post office|police station|"
    "parking garage|city hall|dentist|shopping center|swimming pool|football field",
    "product": "laptop printer keyboard monitor camera headphones charger tablet router phone watch jacket sweater shoes boots "
    "dress backpack umbrella sofa mattress blender toaster kettle microwave bicycle scooter tent guitar drill ladder "
    "refrigerator freezer carpet mirror bookcase|desk lamp|office chair|dining table|phone case|hair dryer|"
    "memory card|wireless mouse|coffee maker|baby stroller",
    "color": "red blue green yellow black white purple orange gray brown silver golden pink",
    "size": "small medium large|extra large",
    "problem": "is broken|does not work|keeps crashing|is too slow|makes a strange noise|will not turn on|is missing a part|"
    "arrived damaged|has a cracked screen|is overheating|lost the connection|stopped working yesterday|is the wrong color|"
    "is leaking water|does not charge anymore|keeps restarting|shows an error message",
    "service": "internet phone television electricity heating insurance banking gym streaming newspaper|mobile data|cloud storage",
    "account": "checking savings business credit student joint|retirement|premium",
    "document": "invoice receipt contract statement passport license certificate prescription report application form|"
    "boarding pass|tax return|insurance card|gift card|warranty",
    "department": "sales billing support shipping accounting marketing security management|human resources|customer service|"
    "technical support|lost and found",
    "appointment": "doctor dentist haircut meeting interview massage inspection checkup|eye exam|oil change|piano lesson|"
    "yoga class|parent meeting|conference call|job interview|flu shot",
    "unit": "minutes hours seconds",
    "measure": "miles kilometers meters feet inches pounds kilograms grams ounces liters gallons cups",
    "currency": "dollars euros pounds",
    "language": "german french spanish italian mandarin arabic russian portuguese hindi swedish polish turkish",
    "phrase": "good morning|thank you very much|where is the hotel|how are you|see you later|happy birthday|excuse me|"
    "i am lost|the bill please|good night|nice to meet you|please help me",
    "team": "tigers eagles lions bears hawks panthers dolphins giants rangers pirates sharks wolves falcons rockets",
    "sport": "football basketball baseball tennis hockey soccer golf volleyball cricket",
    "message": "i am running late|see you soon|dinner is ready|the meeting is canceled|call me back|happy birthday|"
    "i will be there in {num} minutes|do not forget the {grocery}|thanks for your help|the package arrived|"
    "i am at the {place}|we need more {grocery}|the train is delayed|congratulations on the new job|please open the door",
    "nato": "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november oscar papa quebec romeo "
    "sierra tango uniform victor whiskey yankee zulu",
    "letter": "a b c d e f g h i j k l m n o p q r s t u v w x y z",
    "seat": "window aisle middle",
    "class": "economy business|first class|premium economy",
    "vehicle": "car taxi bus train van truck motorcycle bicycle|rental car",
    "book": "the silent garden|a winter journey|the last island|stories of the sea|the hidden library|the paper bridge|"
    "a history of bread|the blue mountain",
    "subject": "history geography chemistry physics biology mathematics astronomy economics music art",
    "answer": "yes|no|yes please|no thank you|that is correct|that is wrong|of course|maybe later|i am not sure|just a moment|"
    "go ahead|please repeat that|speak slowly please|i do not understand|never mind|cancel that|stop|continue|help|goodbye|"
    "hello|that sounds good|can you say that again|i changed my mind|let me think about it|i agree|not right now|"
    "thank you goodbye|hold on a second|you are welcome|who is speaking|wrong number",
}

# Pairs (weight of a topic, its templates). Every template is equally likely within its topic. A
# slot {name} is filled at random.
_TOPICS: list[tuple[float, str]] = [
    (1.0, "set a timer for {num} {unit}|set an alarm for {time}|wake me up at {time}|cancel the alarm for {time}|"
          "how much time is left on the timer|add {num} minutes to the timer|snooze for {num} minutes"),
    (1.2, "remind me to {task} {when}|remind me to {task} at {time}|do not let me forget to {task}|add {task} to my list|"
          "did i already {task}|what do i have to do {when}"),
    (1.2, "call {first} {last}|call {first} on the mobile|text {first} {message}|send a message to {first} saying {message}|"
          "read my last message from {first}|tell {first} that {message}|video call with {first} {last} {when}"),
    (0.9, "play some {genre}|play the {playlist} playlist|play {genre} in the {room}|turn the volume {updown}|"
          "skip this song|next song please|what is the name of this song|play the audio book {book} in the {room}|add this song to the {playlist} playlist"),
    (0.9, "what is the weather in {city} {when}|will it be {weather} in {city} {when}|do i need an umbrella {when}|"
          "how cold is it in {city}|is it going to be {weather} {when}|what is the temperature in {city}"),
    (1.1, "turn {onoff} the {device} in the {room}|turn {onoff} the {device}|set the thermostat to {num} degrees|"
          "dim the lights in the {room} to {num} percent|make the lights in the {room} {color}|is the {device} still on|lock the front door at {time}"),
    (1.1, "how do i get to {num} {street} {road}|navigate to the nearest {place}|take me to the {place} in {city}|"
          "how far is it to {city}|find a {place} near {street} {road}|is there traffic on the way to the {place}|"
          "what time does the {place} close {when}|avoid the highway to {city}|where did i park the {vehicle}"),
    (1.1, "add {grocery} to the shopping list|add {grocery} and {grocery} to the shopping list|i need {num} {measure} of {grocery}|"
          "remove {grocery} from the list|how many calories are in {food}|order {num} {size} {food}|how do i cook {food} with {grocery}"),
    (1.3, "transfer {amount} to {first} {last}|what is the balance of my {account} account|i want to pay {amount} for the {service} bill|"
          "block my credit card please|there is a charge of {amount} that i did not make|open a new {account} account|"
          "did i receive {amount} from {first}|what is my credit limit|send {amount} to my {account} account {when}|exchange {amount} to {currency}"),
    (1.3, "book a table for {small} people {when}|book a flight from {city} to {city} on {date}|i need a hotel in {city} for {small} nights|"
          "change my flight to {city} to {date}|i would like a {seat} seat please|is breakfast included at the hotel|"
          "how much is a ticket to {city} in {class}|reserve a {vehicle} in {city} from {day} to {day}|cancel my reservation for {date}|"
          "find a {cuisine} restaurant in {city}|my flight to {city} leaves at {time}|we need a table for {meal} at {time}"),
    (1.3, "my {product} {problem}|i want to return the {color} {product}|where is my order for the {product}|the {product} i bought on {date} {problem}|"
          "can i get a refund for the {product}|i ordered a {size} {product} but got a {color} one|when will the {product} be delivered|"
          "do you have the {product} in {color}|how much does the {product} cost|i would like to buy {small} of the {color} {product}"),
    (1.1, "my {service} service {problem}|i forgot my password|please reset my password|i want to cancel my {service} contract|"
          "connect me to the {department} department|i have a question about my {document}|please send the {document} to my email|"
          "can i speak to {first} {last} in {department}|how long do i have to wait|i moved to {num} {street} {road} in {city}|"
          "i would like to update my address|my {document} expires in {month}|i lost my {document} in {city}"),
    (0.9, "schedule a {appointment} for {when}|schedule a {appointment} with {first} {last} at {time}|move my {appointment} to {date}|"
          "what is on my calendar {when}|cancel the {appointment} on {date}|do i have a {appointment} {when}|when is the birthday of {first}"),
    (0.8, "how do you say {phrase} in {language}|translate {phrase} to {language}|how many {measure} are in {num} {measure}|"
          "what is {num} plus {num}|what is {num} times {num}|what is {num} percent of {amount}|who won the {sport} game between the {team} and the {team}|"
          "when do the {team} play {when}|tell me {small} facts about {subject}|what time is it in {city}|how old is {first} {last}"),
    (0.9, "my name is {first} {last}|this is {first} {last} calling about the {document}|my last name is {last}|i was born on {date}|"
          "i live at {num} {street} {road}|my address is {num} {street} {road} {city}|you can reach me at {phone}|it happened on {date} at {time}|"
          "the total is {amount}|i paid {amount} on {date}"),
    (0.9, "my code is {code}|the booking number is {code}|the order number is {code}|my license plate is {code}|the serial number starts with {code}|"
          "flight {letter} {letter} {digits3}|the password is {nato} {nato} {nato}|please confirm code {code}|gate {letter} {small}|room number {digits3}"),
    (0.5, "{answer}"),
]  # fmt: skip
_DIGIT_SHARE = 0.25
_DIGIT_CARRIERS = ["my number is", "the number is", "dial", "call", "my account number is", "the code is", "it is"]


@cache
def _slots() -> dict[str, list[str]]:
    slots = {}
    for name, text in _SLOTS.items():
        choices: list[str] = []
        parts = text.split("|")
        choices += [parts[0]] if name in ("task", "message", "problem", "phrase", "book", "answer") else parts[0].split()
        slots[name] = choices + [p.strip() for p in parts[1:]]
    slots["updown"], slots["onoff"] = ["up", "down"], ["on", "off"]
    return slots


@cache
def _templates() -> list[tuple[float, list[str]]]:
    return [(weight, [t.strip() for t in text.split("|")]) for weight, text in _TOPICS]


@cache
def _fixed() -> frozenset[str]:
    return frozenset(_slots()["answer"]) | {t for _, templates in _templates() for t in templates if "{" not in t}


def number(value: int) -> str:
    """A whole number from 0 to 9,999 in words."""
    if value < 10:
        return DIGITS[value]
    if value < 20:
        return _TEENS[value - 10]
    if value < 100:
        return _TENS[value // 10 - 2] + (f" {DIGITS[value % 10]}" if value % 10 else "")
    name, unit = ("hundred", 100) if value < 1000 else ("thousand", 1000)
    return f"{number(value // unit)} {name}" + (f" {number(value % unit)}" if value % unit else "")


def _digits(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(DIGITS) for _ in range(count))


def _special(name: str, rng: random.Random) -> str | None:
    if name == "num":
        return number(rng.choice([rng.randint(2, 20), rng.randint(2, 99), rng.choice([5, 10, 15, 20, 25, 30, 40, 45, 50, 90])]))
    if name == "small":
        return number(rng.randint(2, 12))
    if name == "digits3":
        return _digits(rng, 3)
    if name == "phone":
        return _digits(rng, rng.choice([7, 10]))
    if name == "code":
        letters = [rng.choice(_slots()[rng.choice(["letter", "nato"])]) for _ in range(rng.randint(1, 3))]
        return " ".join([*letters, _digits(rng, rng.randint(2, 4))])
    if name == "amount":
        whole = rng.choice([rng.randint(2, 99), rng.randint(100, 999), 100 * rng.randint(10, 99)])
        cents = f" and {number(rng.randint(5, 99))} cents" if rng.random() < 0.3 else ""
        return f"{number(whole)} {rng.choice(_slots()['currency'])}{cents}"
    if name == "date":
        day = rng.randint(1, 31)
        ordinal = (
            _ORDINALS[day - 1] if day <= 20 else "thirtieth" if day == 30 else f"{_TENS[day // 10 - 2]} {_ORDINALS[day % 10 - 1]}"
        )
        return f"{rng.choice(_slots()['month'])} {ordinal}"
    if name == "time":
        hour = number(rng.randint(1, 12))
        style = rng.randint(0, 4)
        if style == 0:
            return f"{hour} o'clock"
        if style == 1:
            return f"half past {hour}"
        minute = number(rng.choice([5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55])) if style < 4 else ""
        return " ".join(filter(None, [hour, minute, rng.choice(["in the morning", "in the evening", "a m", "p m", ""])]))
    return None


def _fill(template: str, rng: random.Random) -> str:
    def replace(match: re.Match[str]) -> str:
        special = _special(match[1], rng)
        return special if special is not None else _fill(rng.choice(_slots()[match[1]]), rng)

    return re.sub(r"\{(\w+)\}", replace, template)


def _sentence(rng: random.Random) -> str:
    if rng.random() < _DIGIT_SHARE:
        style = rng.random()
        count = 1 if style < 0.06 else rng.randint(2, 6) if style < 0.55 else rng.choice([7, 8, 9, 10, 10, 11])
        digits = _digits(rng, count)
        return f"{rng.choice(_DIGIT_CARRIERS)} {digits}" if count > 2 and rng.random() < 0.2 else digits
    templates = _templates()
    topic = rng.choices(range(len(templates)), [weight for weight, _ in templates])[0]
    return re.sub(r"\ba (?=[aeiou]\w)", "an ", _fill(rng.choice(templates[topic][1]), rng))


def is_digit_string(text: str) -> bool:
    """Whether all words of a text are digits, such as "four two". An empty text gives False."""
    return bool(text) and all(word in DIGITS for word in text.split())


def split_of(text: str) -> str:
    """The split of a sentence.

    Its MD5 puts 80 % of the sentences into train, 10 % into dev and 10 % into test. A template
    without a slot is always in train.
    """
    if text in _fixed():
        return "train"
    bucket = int(hashlib.md5(text.encode()).hexdigest(), 16) % 10
    return "dev" if bucket == 0 else "test" if bucket == 1 else "train"


def sentences(count: int, seed: int, split: str) -> list[str]:
    """`count` random sentences of a split, in lower case.

    A sentence is in exactly one split and occurs once. The exceptions are the ten single digits,
    which are in every split and make up about 2 % of its sentences.

    Raises:
        ValueError: the split is unknown.
    """
    if split not in ("train", "dev", "test"):
        raise ValueError(f"There is no split {split!r}; the splits are train, dev and test.")
    rng = random.Random(f"{seed}-{split}")
    seen: set[str] = set()
    found: list[str] = []
    while len(found) < count:
        text = _sentence(rng)
        if text in DIGITS:
            # The hash keeps 80 % of other sentences for train, and 10 % each for dev and test.
            # Digits are kept in the same proportion, 0.1 / 0.8, so that every split has the same
            # share.
            if split == "train" or rng.random() < 0.125:
                found.append(text)
        elif text not in seen and split_of(text) == split:
            seen.add(text)
            found.append(text)
    return found


@cache
def vocabulary() -> list[str]:
    """Every word that the grammar can produce, sorted."""
    text = " ".join([*_SLOTS.values(), *(t for _, t in _TOPICS), *_DIGIT_CARRIERS, "up down on off o'clock half past in the "
                     "morning evening p m a an and cents hundred thousand", *DIGITS, *_TEENS, *_TENS, *_ORDINALS])  # fmt: skip
    return sorted(set(re.sub(r"\{\w+\}", " ", text).replace("|", " ").split()))
