"""How users tell and ask about themselves, and how the assistant repeats it.

Written in the notation of ``grammar.py``; ``{v}`` is the value, ``{V}`` the same with a capital
letter, ``{n}`` the name of a pet.
"""

from __future__ import annotations

SYSTEM = [
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are a friendly assistant. Answer in short sentences.",
    "You are a [kind|small|polite|careful] assistant.",
    "Be [helpful|friendly|brief|polite|honest].",
    "Answer [the user's questions|briefly|honestly and briefly|every question in one sentence].",
    "You are the demo model of tpserve.",
    "You are a helpful assistant that [answers questions|remembers what the user says].",
    "This is a conversation between a user and an assistant.",
    "You are an assistant. You help people.",
    "You are talking to a new user. Be nice.",
]

TELL: dict[str, list[str]] = {
    "name": [
        "My name is {v}.",
        "My name is {v}.",
        "My name's {v}.",
        "I am {v}.",
        "I'm {v}.",
        "[You can|Please|You may|Just|] call me {v}.",
        "[People|They|My friends|My parents] call me {v}.",
        "Everyone calls me {v}.",
        "Call me {v}.",
        "I am called {v}.",
        "My [first |]name is {v}[.|!]",
        "{V} is my name.",
        "The name is {v}.",
        "I go by {v}.",
        "[Remember|Please remember|Note that|Please note that] my name is {v}.",
        "{V} here.",
    ],
    "color": [
        "My favourite colour is {v}.",
        "My favourite colour is {v}.",
        "My fav colour is {v}.",
        "I like the colour {v}[| best| most].",
        "I love the colour {v}.",
        "The colour I like [most|best] is {v}.",
        "Of all colours I like {v} [best|most].",
        "{V} is my favourite colour.",
        "{V} is the colour I like best.",
        "I [like|love|prefer] {v}.",
        "My [best|preferred] colour is {v}.",
        "[Remember|Please remember|Note] that my favourite colour is {v}.",
    ],
    "animal": [
        "My favourite animal is the {v}.",
        "My favourite animal is the {v}.",
        "My favourite animal is a {v}.",
        "My favourite animal: {v}.",
        "The {v} is my favourite animal.",
        "The animal I like [most|best] is the {v}.",
        "I like the {v} [best|most] of all animals.",
        "Of all animals I like the {v} [best|most].",
        "My fav animal is the {v}.",
        "[Remember|Please remember|Note] that my favourite animal is the {v}.",
    ],
    "pet": [
        "I have a {v}.",
        "I have a {v}.",
        "I have a pet {v}.",
        "My pet is a {v}.",
        "I've got a {v}[| at home].",
        "At home I have a {v}.",
        "I [live with|own|keep] a {v}.",
        "As a pet I have a {v}.",
        "My animal is a {v}.",
    ],
    "pet_name": [
        "I have a {v} [called|named] {n}.",
        "My {v} is called {n}.",
        "My {v}'s name is {n}.",
        "My pet is a {v} [called|named] {n}.",
        "I have a {v}. [His|Her|Its] name is {n}.",
    ],
    "food": [
        "My favourite food is {v}.",
        "My favourite food is {v}.",
        "My favourite dish is {v}.",
        "I [like|love] to eat {v}.",
        "The food I like [most|best] is {v}.",
        "I like eating {v}.",
        "{V} is my favourite food.",
    ],
    "city": [
        "I live in {v}.",
        "I live in {v}.",
        "I am from {v}.",
        "I come from {v}.",
        "I'm from {v}.",
        "My [home|home town|city|hometown] is {v}.",
        "My home is in {v}.",
    ],
    "age": [
        "I am {v} years old.",
        "I am {v} years old.",
        "I'm {v} years old.",
        "My age is {v}.",
        "I am {v}.",
        "I'm {v}.",
        "I just turned {v}.",
    ],
}
TELL_PLURAL = [
    "I [love|like] {v}s.",
    "My favourite animals are {v}s.",
    "I like {v}s [best|most].",
    "I like {v}s more than all other animals.",
]

CORRECTION = [
    "Actually, {}",
    "Actually {}",
    "Sorry, {}",
    "No, {}",
    "No wait, {}",
    "I made a mistake: {}",
    "I changed my mind, {}",
    "Oh, that was wrong: {}",
    "Now {}",
    "Correction: {}",
]

CLAUSE = {
    "name": "your name is {v}",
    "color": "your favourite colour is {v}",
    "animal": "your favourite animal is the {v}",
    "pet": "you have a {v}",
    "food": "your favourite food is {v}",
    "city": "you live in {v}",
    "age": "you are {v} years old",
}
CLAUSE_PLURAL = "your favourite animals are {v}s"

UNKNOWN_NOUN = {
    "name": "your name",
    "color": "your favourite colour",
    "animal": "your favourite animal",
    "pet": "which pet you have",
    "pet_name": "the name of your pet",
    "food": "your favourite food",
    "city": "where you live",
    "age": "your age",
}
NOUN = {
    "name": "my name",
    "color": "my favourite colour",
    "animal": "my favourite animal",
    "pet": "my pet",
    "pet_name": "the name of my pet",
    "food": "my favourite food",
    "city": "my city",
    "age": "my age",
}

_KNOW = (
    "[Do you know|Do you remember|Can you tell me|Tell me|Please tell me|Do you still know|"
    "Can you remember|Remind me of|Could you tell me|I forgot|And] "
)

ASK: dict[str, list[str]] = {
    "name": [
        "What is my name?",
        "What is my name?",
        "What's my name?",
        _KNOW + "my name?",
        "[Do you know|Do you remember|Tell me|Can you tell me] [what my name is|who I am]?",
        "Who am I?",
        "What am I called?",
        "What was my name[| again]?",
        "What did I say my name was?",
        "[Which|What] name did I [tell|give] you?",
        "What did I tell you my name is?",
        "[How do you call me|What do you call me|What do people call me]?",
        "Say my name.",
        "Remind me, what is my name?",
    ],
    "color": [
        "What is my favourite colour?",
        "What is my favourite colour?",
        "What's my favourite colour?",
        "What's my fav colour?",
        "[Which|What] colour do I like[| best| most| the most]?",
        "[Which|What] colour is my favourite?",
        "[Which|What] is my favourite colour?",
        _KNOW + "my favourite colour?",
        "[Do you know|Do you remember|Tell me|Can you tell me] [which|what] [colour I like|my "
        "favourite colour is]?",
        "What was my favourite colour[| again]?",
        "What did I say my favourite colour was?",
        "[Which|What] colour did I [tell you|say I like|mention]?",
        "What is the colour I like best?",
        "And my colour?",
    ],
    "animal": [
        "What is my favourite animal?",
        "What is my favourite animal?",
        "What's my favourite animal?",
        "[Which|What] animal do I like[| best| most| the most]?",
        "[Which|What] animal is my favourite?",
        "[Which|What] is my favourite animal?",
        _KNOW + "my favourite animal?",
        "[Do you know|Do you remember|Tell me|Can you tell me] [which|what] [animal I like|my "
        "favourite animal is]?",
        "What was my favourite animal[| again]?",
        "What did I say my favourite animal was?",
    ],
    "pet": [
        "[What|Which] pet do I have?",
        "[What|Which] animal do I have?",
        "What is my pet?",
        "What kind of [pet|animal] do I have?",
        "[Do you know|Do you remember|Tell me] [what|which] [pet|animal] I have?",
        "Do I have a pet?",
        _KNOW + "my pet?",
        "What animal is my pet?",
        "What pet did I say I have?",
    ],
    "pet_name": [
        "What is my {pet} called?",
        "What is the name of my {pet}?",
        "What is my {pet}'s name?",
        "Do you [know|remember] the name of my {pet}?",
        "What is my pet called?",
        "What is the name of my pet?",
    ],
    "food": [
        "What is my favourite food?",
        "What is my favourite food?",
        "What's my favourite food?",
        "What do I like to eat?",
        "[Which|What] food do I like[| best| most]?",
        _KNOW + "my favourite food?",
        "What was my favourite food[| again]?",
    ],
    "city": [
        "Where do I live?",
        "Where do I live?",
        "Where am I from?",
        "Where do I come from?",
        "[Which|What] city do I live in?",
        "What is my city?",
        "What is my home town?",
        "[Do you know|Do you remember|Tell me] where I live?",
    ],
    "age": [
        "How old am I?",
        "How old am I?",
        "What is my age?",
        "[Do you know|Do you remember|Tell me] [how old I am|my age]?",
        "What's my age?",
    ],
}
ASK_ANY_ANIMAL = "[Which|What] animal did I [mention|tell you about|talk about|say]?"
ASK_ALL = (
    "[What do you know about me?|Tell me what you know about me.|What have I told you so far?|"
    "What have I told you about myself?|Do you know anything about me?|What did I tell you about "
    "myself?|What do you remember about me?|Tell me about me.|Tell me everything you know about "
    "me.|Summarize what you know about me.|So what do you know about me?|Who am I and what do I "
    "like?|What did I tell you?]"
)
