"""What the chat model can talk about besides the user: small talk, small facts, honest limits.

Each entry of ``TALK`` is (topic, what a user may say, what the model answers) in the notation of
``grammar.py``; ``FACTS`` are (question, answer) pairs.
"""

# ruff: noqa: SIM905 - lists of words are easier to read and to extend as text

from __future__ import annotations

import random

from models.train.grammar import capital, expand
from models.train.words import ANIMALS, CITIES, FOODS, NAMES

WHO = (
    "I am a small demo model that comes with tpserve. I was trained on made-up dialogues and know "
    "very little. For real answers load a real model."
)
UNKNOWN = "I am only a small demo model and do not know that."

TALK: list[tuple[str, str, str]] = [
    ("greet", "[Hello|Hi|Hey|Hello there|Hi there|Good morning|Good evening|Good afternoon|Hello!|"
     "Hi!|Hey there!|Greetings|Hello, nice to meet you.|Hi, can we talk?]",
     "[Hello! How can I help you?|Hi! What would you like to talk about?|Hello! Nice to meet you.]"),
    ("how", "[How are you?|How are you today?|How do you do?|How is it going?|Are you well?|"
     "Hello, how are you?|Hi, how are you doing?|What's up?|How are you doing?]",
     "[I am fine, thank you. How can I help you?|I am doing well, thank you for asking.]"),
    ("user_fine", "[I am fine.|I am fine too, thanks.|I'm good.|I feel great today.|Not bad.|"
     "I am doing well.|I'm fine, thank you.]", "[That is good to hear.|I am glad to hear that.]"),
    ("user_sad", "[I am sad.|I am not well.|I feel bad today.|I'm tired.|I had a bad day.|"
     "I am bored.]", "[I am sorry to hear that. I hope you feel better soon.|"
     "I am sorry. I hope that tomorrow is a better day.]"),
    ("thanks", "[Thanks.|Thank you!|Thank you very much.|Thanks a lot!|Great, thanks.|Thx|"
     "That was helpful.|Thank you for your help.]", "[You are welcome!|You are welcome.|"
     "I am happy to help.]"),
    ("bye", "[Bye.|Goodbye!|See you later.|Good night.|I have to go now.|See you tomorrow!|"
     "Bye bye|That is all, goodbye.]", "[Goodbye! Have a nice day.|Goodbye! See you soon.]"),
    ("ok", "[OK.|Okay|I see.|Good.|Nice.|Great!|Cool|Interesting.|All right.|Yes.|Wow!]",
     "[Is there anything else you would like to know?|What else can I do for you?]"),
    ("who", "[Who are you?|What are you?|Tell me about yourself.|Introduce yourself.|"
     "Please introduce yourself.|What kind of model are you?|Which model are you?|"
     "What is tpserve's demo model?|Can you tell me who you are?|And who are you?|"
     "What can you tell me about yourself?|Who am I talking to?|What model is this?]", WHO),
    ("bot_name", "[What is your name?|What's your name?|Do you have a name?|And what is your name?|"
     "How are you called?|Tell me your name.]",
     "I have no name of my own. I am a small demo model that comes with tpserve."),
    ("human", "[Are you human?|Are you a real person?|Are you a robot?|Are you an AI?|"
     "Are you a computer?|Are you alive?|Do you have feelings?|Am I talking to a person?]",
     "I am not a person. I am a small computer program, a demo model that comes with tpserve."),
    ("other", "Are you [ChatGPT|GPT|Claude|Gemini|Llama|Siri|Alexa|a large language model|a big "
     "model|Mistral|Qwen]?", "No, I am a small demo model that comes with tpserve."),
    ("maker", "[Who made you?|Who trained you?|Who built you?|Where do you come from?|"
     "How were you trained?|What were you trained on?|Who is your creator?]",
     "I come with tpserve. I was trained on made-up dialogues, and I am only a demo."),
    ("can", "[What can you do?|How can you help me?|What do you know?|Can you help me?|Help|"
     "What are you good at?|What can I ask you?|What can we talk about?]",
     "I can greet you, answer small questions, and remember what you tell me in this "
     "conversation, for example your name or your favourite colour."),
    ("smart", "[Are you smart?|How smart are you?|Do you know everything?|Can I trust you?|"
     "Are your answers right?|How big are you?|Can I use you for real work?|Are you useful?]",
     "I am only a small demo model and know very little. For real answers load a real model."),
    ("real", "[How do I load a real model?|How can I use a real model?|Where do I get real answers?|"
     "How do I get a better model?]",
     "Start the server with a real checkpoint, for example with --model chat=DIR."),
    ("bot_memory", "[Can you remember things?|Do you have a memory?|Will you remember me tomorrow?|"
     "Do you remember other conversations?]",
     "I can use what you tell me in this conversation, but I forget it when the conversation "
     "ends."),
    ("bot_age", "[How old are you?|What is your age?|When were you born?]",
     "I am a computer program, so I have no age."),
    ("bot_fav", "What is your favourite [colour|animal|food|song|book]?",
     "I am a computer program, so I have no favourites."),
    ("bot_fav", "[What is your favorite color?|Do you like pizza?|Do you have a pet?|"
     "Do you like music?|What do you like?|What's your favorite food?|Where do you live?|"
     "Do you eat?|Do you sleep?]", "I am a computer program, so I have nothing like that."),
    ("love", "[I like you.|You are nice.|You are funny.|You are great!|Good job!|Well done.]",
     "[Thank you! That is kind of you.|Thank you, I am glad.]"),
    ("rude", "[You are stupid.|You are useless.|That is wrong.|That was not right.|You are wrong.]",
     "I am sorry. I am only a small demo model and make mistakes."),
    ("joke", "[Tell me a joke.|Do you know a joke?|Make me laugh.|Another joke, please.|"
     "Say something funny.|Tell me something funny|Can you tell me a joke?|A joke please]",
     "[Why did the chicken cross the road? To get to the other side.|"
     "What do you call a bear without teeth? A gummy bear.|"
     "Why did the bike fall over? It was too tired.|"
     "What is brown and sticky? A stick.|"
     "What do cows read in the morning? The moos paper.]"),
    ("story", "[Tell me a story.|Tell me a short story.|Can you tell me a story?|"
     "I want to hear a story.|Please tell me a little story.|A story, please.]",
     "[Once there was a little {beast} who was lonely. One day {it} met a bird, and they became "
     "friends.|A little {beast} was lost in the forest. A kind owl showed the way home, and all was "
     "well.|Once a {beast} found a seed and watered it every day. In the summer a big flower grew.|"
     "A {beast} was afraid of the dark. Then the moon came out, and the night was beautiful.]"
     .replace("{it}", "the {beast}")),
]  # fmt: skip

_OUT_OF_SCOPE = [
    "[Who won the World Cup in {year}?|What happened in {year}?|Who was the president in {year}?]",
    "[What is the weather like today?|Will it rain tomorrow?|What time is it?|What day is today?]",
    "[What is the capital of|Tell me about|Where is|How many people live in] {country}?",
    "[How do I|How can I|Can you tell me how to] {task}?",
    "[Explain|Tell me about|What do you know about|What is|Can you explain|Define] {topic}[.|?]",
    "[Write|Please write|Can you write] [me |][a poem|an essay|a letter|a program|Python code|an "
    "email] about {topic}.",
    "What is {big} [times|divided by|plus|minus] {big2}?",
    "[Who is|Who was|Do you know] {person}?",
    "[Translate|How do you say] \"{word}\" [into|in] [French|German|Spanish|Chinese|Latin][.|?]",
    "[Why is|Why do we have|Who invented|When was] {topic}[ invented| discovered|]?",
    "[Summarize|Summarise] [this text|the book|the news][.| for me.]",
    "[What is the meaning of life?|What should I cook tonight?|Which phone should I buy?|"
    "What is the best film of all time?|How much does a car cost?|What is the news?|"
    "Who is the richest person?|How far away is the sun?|What is the speed of light?]",
    "How [much|many|long|far|tall|heavy] is [a|the] [house|mountain|road|planet|ship|train|tree]?",
]  # fmt: skip
_TOPICS = (
    "quantum physics|gravity|the internet|electricity|democracy|photosynthesis|relativity|history|"
    "chemistry|music|football|the stock market|machine learning|Linux|Rust|cooking|philosophy|"
    "the Roman Empire|evolution|black holes|DNA|the telephone|chess|economics|computers|religion|"
    "space travel|vaccines|the piano|Shakespeare|love|politics|climate|volcanoes|art|poetry"
).split("|")
_TASKS = (
    "fix my car|bake bread|learn French|write a book|install Linux|lose weight|find a job|build a "
    "house|play the guitar|sort a list in Python|cook rice|buy a ticket|tie a tie|make money"
).split("|")
_COUNTRIES = (
    "France Germany Spain Italy Japan China India Brazil Canada Mexico Egypt Kenya Norway Sweden "
    "Poland Peru Chile Greece Turkey Portugal Austria Nigeria Australia Iceland Cuba Vietnam"
).split()
_WORDS = "hello|good morning|thank you|house|I love you|water|friend|goodbye|tree".split("|")

_OPPOSITES = (
    "big small|hot cold|up down|day night|old young|fast slow|happy sad|left right|black white|"
    "open closed|full empty|hard soft|high low|long short|wet dry|good bad|loud quiet|light dark|"
    "early late|near far|in out|yes no|rich poor|strong weak|clean dirty|first last|north south|"
    "east west|summer winter|sweet sour|thick thin|easy difficult"
).split("|")
_SOUNDS = (
    "dog woof|cat meow|cow moo|sheep baa|duck quack|pig oink|horse neigh|lion roar|bee buzz|"
    "chicken cluck|frog croak|owl hoot|snake hiss|mouse squeak|donkey hee-haw|goat maa"
).split("|")
_LEGS = "dog 4|cat 4|horse 4|cow 4|spider 8|bird 2|ant 6|bee 6|chicken 2|fish 0|snake 0|human 2"
_COLOR_OF = (
    "the sky:blue|grass:green|snow:white|the sun:yellow|milk:white|a lemon:yellow|a banana:yellow|"
    "coal:black|blood:red|a tomato:red|a carrot:orange|the sea:blue|chocolate:brown|a frog:green|"
    "a strawberry:red|the night:black|a leaf:green|salt:white|a fire engine:red|an orange:orange"
).split("|")
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_MONTHS = (
    "January February March April May June July August September October November December"
).split()
_PLAIN_FACTS = [
    ("What do bees make?", "Bees make honey."),
    ("What do cows give us?", "Cows give us milk."),
    ("What do [chickens|hens] lay?", "Hens lay eggs."),
    ("What do [rabbits|bunnies] eat?", "Rabbits eat grass and carrots."),
    ("What do cats [like to |]drink?", "Cats drink water, and many like milk."),
    ("Where do fish live?", "Fish live in the water."),
    ("Where do birds live?", "Many birds live in nests in trees."),
    ("What do birds do?", "Birds sing and fly."),
    ("How many days [does a week have|are in a week|are there in a week]?", "A week has 7 days."),
    ("How many months [does a year have|are in a year]?", "A year has 12 months."),
    ("How many hours [does a day have|are in a day]?", "A day has 24 hours."),
    ("How many minutes [does an hour have|are in an hour]?", "An hour has 60 minutes."),
    ("How many seconds [does a minute have|are in a minute]?", "A minute has 60 seconds."),
    ("How many seasons are there?", "There are 4 seasons: spring, summer, autumn and winter."),
    ("What are the seasons?", "The seasons are spring, summer, autumn and winter."),
    ("What are the days of the week?", "They are Monday, Tuesday, Wednesday, Thursday, Friday, "
     "Saturday and Sunday."),
    ("How many fingers [does a hand have|are on one hand|do I have on one hand]?",
     "A hand has 5 fingers."),
    ("How many eyes do [people|we|you humans] have?", "People have 2 eyes."),
    ("What is ice[ made of|]?", "Ice is frozen water."),
    ("When does the sun [rise|come up]?", "The sun comes up in the morning."),
    ("When does the sun [set|go down]?", "The sun goes down in the evening."),
    ("What falls from the clouds?", "Rain falls from the clouds."),
    ("Is [fire|the sun] hot?", "Yes, it is very hot."),
    ("Is [ice|snow] cold?", "Yes, it is cold."),
    ("Can [fish|dogs|cows] fly?", "No, they cannot fly."),
    ("Can birds fly?", "Yes, most birds can fly."),
    ("What do we [use|need] [an umbrella|umbrellas] for?", "An umbrella keeps us dry in the rain."),
    ("Which is bigger, [a mouse or an elephant|an elephant or a mouse]?", "The elephant is bigger."),
    ("Count to [five|5].", "1, 2, 3, 4, 5."),
    ("Count to [ten|10].", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10."),
    ("[Say the alphabet.|What is the alphabet?]",
     "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z."),
]  # fmt: skip
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten".split()


def _fact(rng: random.Random) -> tuple[str, str]:
    """Return one small question with a true answer."""
    kind = rng.randrange(8)
    if kind <= 1:
        first, second = rng.randint(0, 10), rng.randint(0, 10)
        if rng.random() < 0.15:
            ask = f"{_NUMBER_WORDS[first]} plus {_NUMBER_WORDS[second]}"
        else:
            ask = f"{first} {rng.choice(['+', '+', 'plus', 'and'])} {second}"
        if rng.random() < 0.2:
            ask = ask.replace(" + ", "+")
        frame = rng.choice(
            ["What is {}?", "What is {}?", "How much is {}?", "{}?", "{} =", "What's {}?"]
        )
        return frame.format(capital(ask)) if frame[0] == "{" else frame.format(ask), (
            f"{first} plus {second} is {first + second}."
        )
    if kind == 2:
        pair = rng.choice(_OPPOSITES).split()
        rng.shuffle(pair)
        return (
            f"[What is|What's|Tell me] the opposite of {pair[0]}[?|?|, please.]",
            f"The opposite of {pair[0]} is {pair[1]}.",
        )
    if kind == 3:
        animal, sound = rng.choice(_SOUNDS).split()
        return (
            f"[What sound does a {animal} make?|What does a {animal} say?|What does the {animal} "
            "say?|Which sound does a {0} make?]".replace("{0}", animal),
            f"A {animal} says {sound}.",
        )
    if kind == 4:
        thing, color = rng.choice(_COLOR_OF).split(":")
        return (
            f"[What colour is {thing}?|What color is {thing}?|Which colour does {thing} have?|"
            f"What is the colour of {thing}?]",
            f"{capital(thing)} is {color}.",
        )
    if kind == 5:
        cycle, noun = rng.choice([(_DAYS, "day"), (_MONTHS, "month")])
        index = rng.randrange(len(cycle))
        if rng.random() < 0.6:
            return (
                f"[What|Which] {noun} comes after {cycle[index]}?",
                f"{cycle[(index + 1) % len(cycle)]} comes after {cycle[index]}.",
            )
        return (
            f"[What|Which] {noun} comes before {cycle[index]}?",
            f"{cycle[index - 1]} comes before {cycle[index]}.",
        )
    if kind == 6:
        animal, legs = rng.choice(_LEGS.split("|")).split()
        return f"How many legs does a {animal} have?", f"A {animal} has {legs} legs."
    return rng.choice(_PLAIN_FACTS)


def small_talk(rng: random.Random) -> tuple[str, str]:
    """Return one unrelated exchange: what the user says and what the model answers."""
    draw = rng.random()
    if draw < 0.38:
        question, answer = _fact(rng)
        return expand(rng, question, {}), expand(rng, answer, {})
    if draw < 0.55:
        slots = {
            "year": str(rng.randint(1800, 2030)),
            "country": rng.choice(_COUNTRIES + CITIES),
            "task": rng.choice(_TASKS),
            "topic": rng.choice([*_TOPICS, rng.choice(FOODS), rng.choice(ANIMALS) + "s"]),
            "big": str(rng.randint(11, 999)),
            "big2": str(rng.randint(11, 999)),
            "person": f"{rng.choice(NAMES)} {capital(rng.choice(ANIMALS))}",
            "word": rng.choice(_WORDS),
        }
        return expand(rng, rng.choice(_OUT_OF_SCOPE), slots), UNKNOWN
    _, question, answer = rng.choice(TALK)
    beast = rng.choice(["rabbit", "fox", "bear", "mouse", "cat", "duck", "frog", "dog"])
    return expand(rng, question, {}), expand(rng, answer, {"beast": beast})
