"""Intents of the example assistant: its tools, and the phrasings of requests for them.

Training and evaluation have no phrasing in common. A slot in braces is copied from the request into the tool call; a
fixed argument follows from the phrasing itself ("turn the flashlight off").
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qat_edge.demo_data import words
from qat_edge.demo_data.words import Halves


@dataclass(frozen=True)
class Intent:
    """A tool call and the ways to request it.

    Attributes:
        tool: Name of the tool.
        phrasings: Requests with slots in braces.
        slots: Values by argument, in the order of the tool call.
        fixed: Arguments with one value, which come after the slots.
    """

    tool: str
    phrasings: Halves
    slots: dict[str, Halves] = field(default_factory=dict)
    fixed: dict[str, str] = field(default_factory=dict)


INTENTS = (
    Intent(
        "set_alarm",
        Halves(
            (
                "set an alarm for {time}",
                "wake me up at {time}",
                "I need an alarm at {time}",
                "alarm at {time}",
                "get me out of bed at {time}",
            ),
            ("please have the alarm ring at {time}", "make sure I am awake by {time}", "put an alarm on for {time}"),
        ),
        {"time": words.TIME},
    ),
    Intent(
        "set_timer",
        Halves(
            (
                "set a timer for {duration}",
                "start a {duration} timer",
                "count down {duration}",
                "timer for {duration}",
                "tell me when {duration} have passed",
            ),
            ("I need a countdown of {duration}", "run the timer for {duration}", "beep after {duration}"),
        ),
        {"duration": words.DURATION},
    ),
    Intent(
        "send_message",
        Halves(
            (
                "text {to} that {text}",
                "send a message to {to} saying {text}",
                "tell {to} that {text}",
                "message {to}: {text}",
                "let {to} know {text}",
                "write to {to} that {text}",
            ),
            ("send {to} a text saying {text}", "drop {to} a message: {text}", "inform {to} that {text}"),
        ),
        {"to": words.CONTACT, "text": words.MESSAGE},
    ),
    Intent(
        "call",
        Halves(
            ("call {contact}", "phone {contact}", "ring {contact}", "dial {contact}", "I want to talk to {contact}"),
            ("give {contact} a call", "start a call with {contact}", "get {contact} on the phone"),
        ),
        {"contact": words.CONTACT},
    ),
    Intent(
        "read_messages",
        Halves(
            (
                "read my messages from {contact}",
                "what did {contact} write",
                "show me the texts from {contact}",
                "any messages from {contact}",
            ),
            ("did I get a text from {contact}", "read out what {contact} sent me"),
        ),
        {"contact": words.CONTACT},
    ),
    Intent(
        "play_song",
        Halves(
            (
                "play {song} by {artist}",
                "put on {song} by {artist}",
                "I want to hear {song} by {artist}",
                "play the song {song} by {artist}",
            ),
            ("start {song} by {artist}", "let me listen to {song} by {artist}"),
        ),
        {"song": words.SONG, "artist": words.ARTIST},
    ),
    Intent(
        "play_artist",
        Halves(
            (
                "play some music by {artist}",
                "play songs by {artist}",
                "put on something by {artist}",
                "play {artist} on shuffle",
            ),
            ("shuffle music by {artist}", "I feel like songs by {artist}"),
        ),
        {"artist": words.ARTIST},
    ),
    Intent(
        "navigate",
        Halves(
            (
                "navigate to {destination}",
                "take me to {destination}",
                "directions to {destination}",
                "how do I get to {destination}",
                "start the route to {destination}",
            ),
            ("guide me to {destination}", "show me the way to {destination}", "I have to drive to {destination}"),
        ),
        {"destination": words.PLACE},
    ),
    Intent(
        "get_weather",
        Halves(
            (
                "what is the weather in {place} {day}",
                "weather forecast for {place} {day}",
                "will it rain in {place} {day}",
                "how warm is it in {place} {day}",
                "do I need an umbrella in {place} {day}",
            ),
            ("how is the weather in {place} {day}", "is it going to be sunny in {place} {day}"),
        ),
        {"place": words.CITY, "day": words.DAY},
    ),
    Intent(
        "add_reminder",
        Halves(
            (
                "remind me to {text} at {time}",
                "set a reminder to {text} at {time}",
                "do not let me forget to {text} at {time}",
                "add a reminder for {time} to {text}",
                "at {time} remind me to {text}",
            ),
            ("I have to {text} at {time}, remind me", "give me a reminder at {time} to {text}"),
        ),
        {"text": words.TASK, "time": words.TIME},
    ),
    Intent(
        "add_event",
        Halves(
            (
                "add a {title} on {day} at {time}",
                "schedule a {title} for {day} at {time}",
                "put a {title} in my calendar for {day} at {time}",
                "create an event {title} {day} {time}",
                "book a {title} {day} at {time}",
            ),
            ("plan a {title} for {day} at {time}", "my calendar needs a {title} {day} at {time}"),
        ),
        {"title": words.EVENT, "day": words.DAY, "time": words.TIME},
    ),
    Intent(
        "set_volume",
        Halves(
            (
                "set the volume to {percent} percent",
                "volume {percent}",
                "turn the sound to {percent} percent",
                "change the volume to {percent}",
            ),
            ("make the volume {percent} percent", "put the sound at {percent}"),
        ),
        {"percent": words.PERCENT},
    ),
    Intent(
        "set_brightness",
        Halves(
            (
                "set the brightness to {percent} percent",
                "brightness {percent}",
                "dim the screen to {percent} percent",
                "change the screen brightness to {percent}",
            ),
            ("make the screen {percent} percent bright", "put the brightness at {percent}"),
        ),
        {"percent": words.PERCENT},
    ),
    Intent(
        "set_flashlight",
        Halves(
            ("turn on the flashlight", "flashlight on", "switch on the torch", "light up the flashlight"),
            ("switch the flashlight on", "I need the flashlight on"),
        ),
        fixed={"state": "on"},
    ),
    Intent(
        "set_flashlight",
        Halves(
            ("turn off the flashlight", "flashlight off", "switch off the torch", "kill the flashlight"),
            ("switch the flashlight off", "I want the flashlight off"),
        ),
        fixed={"state": "off"},
    ),
    Intent(
        "set_wifi",
        Halves(
            ("turn on the wifi", "wifi on", "switch on wireless", "connect the wifi"),
            ("switch the wifi on", "I need the wifi on"),
        ),
        fixed={"state": "on"},
    ),
    Intent(
        "set_wifi",
        Halves(
            ("turn off the wifi", "wifi off", "switch off wireless", "disconnect the wifi"),
            ("switch the wifi off", "I want the wifi off"),
        ),
        fixed={"state": "off"},
    ),
    Intent(
        "open_app",
        Halves(
            ("open {app}", "launch {app}", "start the {app} app", "go to the {app} app", "show me {app}"),
            ("open up the {app} app", "bring up {app}"),
        ),
        {"app": words.APP},
    ),
    Intent(
        "translate",
        Halves(
            (
                "translate {text} into {language}",
                "how do you say {text} in {language}",
                "what is {text} in {language}",
                "say {text} in {language}",
            ),
            ("give me the {language} for {text}", "put {text} into {language}"),
        ),
        {"text": words.PHRASE, "language": words.LANGUAGE},
    ),
    Intent(
        "convert",
        Halves(
            (
                "convert {amount} {from} to {to}",
                "how many {to} are {amount} {from}",
                "what is {amount} {from} in {to}",
                "change {amount} {from} into {to}",
            ),
            ("turn {amount} {from} into {to}", "give me {amount} {from} as {to}"),
        ),
        {"amount": words.AMOUNT, "from": words.FROM_UNIT, "to": words.TO_UNIT},
    ),
    Intent(
        "take_note",
        Halves(
            (
                "take a note: {text}",
                "write down that {text}",
                "note that {text}",
                "make a note that {text}",
                "remember that {text}",
            ),
            ("jot down that {text}", "save a note: {text}"),
        ),
        {"text": words.NOTE},
    ),
    Intent(
        "search_web",
        Halves(
            (
                "search the web for {query}",
                "look up {query}",
                "what can you find on {query}",
                "find {query} online",
                "search for {query}",
            ),
            ("run a web search for {query}", "check the internet for {query}"),
        ),
        {"query": words.QUERY},
    ),
    Intent(
        "add_to_list",
        Halves(
            (
                "add {item} to my {list} list",
                "put {item} on the {list} list",
                "I need {item} on my {list} list",
                "write {item} on the {list} list",
            ),
            ("my {list} list should have {item}", "include {item} in the {list} list"),
        ),
        {"item": words.ITEM, "list": words.LIST},
    ),
    Intent(
        "get_news",
        Halves(
            (
                "what is the news about {topic}",
                "news on {topic}",
                "read me the news about {topic}",
                "latest in {topic}",
            ),
            ("any news about {topic}", "tell me the headlines on {topic}"),
        ),
        {"topic": words.TOPIC},
    ),
    Intent(
        "find_restaurant",
        Halves(
            (
                "find a place for {food} near {near}",
                "where can I get {food} near {near}",
                "I want {food} near {near}",
                "show {food} restaurants near {near}",
            ),
            ("who serves {food} near {near}", "get me a table for {food} near {near}"),
        ),
        {"food": words.FOOD, "near": words.PLACE},
    ),
    Intent(
        "take_photo",
        Halves(
            ("take a selfie", "use the front camera for a photo", "selfie please", "photo of me"),
            ("snap a selfie", "take a picture of me"),
        ),
        fixed={"camera": "front"},
    ),
    Intent(
        "take_photo",
        Halves(
            ("take a photo", "take a picture with the back camera", "snap a photo", "shoot a picture"),
            ("take a shot with the rear camera", "capture a photo"),
        ),
        fixed={"camera": "back"},
    ),
)

# Beginnings of a request, combined with any phrasing.
OPENERS = Halves(("", "", "please ", "hey, ", "ok, ", "now "), ("", "", "hi, ", "quickly, ", "hello, "))
