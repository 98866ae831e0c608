"""Word lists shared by the story and the dialogue generator."""

# ruff: noqa: SIM905 - lists of words are easier to read and to extend as text

from __future__ import annotations

GIRLS = (
    "Lily Anna Mia Emma Sara Lucy Zoe Ella Nora Amy Rosie Ruby Clara Molly Maya Ivy Alice Daisy "
    "Hannah Grace Eva Sophie Nina Jane Kate Tina Lena Olivia Ava Bella Chloe Fatima Aisha Priya "
    "Mei Yuki Ingrid Greta Heidi Marta Carla Rosa Elena Sofia Julia Laura Paula Vera Wanda Tessa"
).split()
BOYS = (
    "Tom Ben Max Sam Tim Leo Jack Noah Finn Oscar Theo Luke Adam Henry Oliver Peter Jake Billy "
    "Charlie Danny Eli Felix George Harry Ian James Kevin Liam Milo Nick Owen Paul Ravi Sean Toby "
    "Victor Will Zack Omar Ali Hugo Ivan Jonas Karl Lars Mateo Diego Pablo Kenji Anton"
).split()
MORE_NAMES = (
    "Aaron Abby Abigail Ada Adele Adrian Agnes Alan Albert Alex Alexa Alfred Alma Amanda Amber "
    "Amelia Amir Andrea Andrew Andy Angela Angus Anita Annabel Arjun Arthur Astrid Audrey August "
    "Aurora Axel Barbara Beatrice Bernard Beth Betty Bianca Bjorn Bob Bonnie Boris Brenda Brian "
    "Bruno Caleb Callum Cameron Camille Carl Carmen Carol Caroline Cecilia Chandra Chen Chiara "
    "Chris Christina Claire Claude Colin Connor Cora Craig Dalia Damian Daniel Darius David Dean "
    "Deborah Dennis Derek Diana Dmitri Dominic Donna Doris Dylan Edgar Edith Edward Eileen Elias "
    "Elisa Eliza Elsa Emil Emily Enzo Eric Erika Esther Ethan Eugene Evelyn Fabian Farah Faye "
    "Felicity Fiona Flora Florence Frances Francis Frank Freya Frida Gabriel Gavin Gemma Georgia "
    "Gerald Gina Giulia Gloria Gordon Graham Gus Gwen Hamza Harold Harriet Hassan Hazel Heather "
    "Hector Helen Helga Hilda Holly Howard Ibrahim Ida Igor Imani Irene Iris Irma Isaac Isabel "
    "Isla Ismael Jacob Jamal Jan Janet Jasmine Jason Jasper Jean Jeff Jenny Jeremy Jerome Jesse "
    "Jill Jin Joan Joe Joel John Jorge Joseph Joy Juan Judith Julian June Justin Kamal Karen "
    "Katrin Keira Keith Ken Kiran Kirsten Klaus Kofi Kurt Lara Latif Layla Leah Leila Leon Leonard "
    "Lewis Liang Linda Lisa Lorenzo Louis Louise Luca Lucas Luis Luna Lydia Mabel Magnus Malik "
    "Manuel Marcel Marco Margaret Maria Marie Mario Mark Martin Mary Mason Matthew Maurice Megan "
    "Melissa Michael Miguel Mila Mina Mira Mohamed Mona Monica Morgan Nadia Naomi Natalie Nathan "
    "Neil Nell Niko Nils Nigel Noel Noor Norman Odette Olaf Olga Oskar Otto Pamela Patrick Pearl "
    "Pedro Penny Petra Philip Phoebe Pierre Polly Quentin Rachel Rafael Ralph Raul Ray Rebecca "
    "Rhea Richard Rita Robert Robin Roger Roland Roman Ronald Rory Rowan Roy Rupert Russell Ruth "
    "Ryan Sabine Sally Salma Samira Sandra Sanjay Santiago Sarah Scott Selma Serena Sergei Shane "
    "Sharon Sheila Shirin Sidney Sienna Silvia Simon Stella Stephen Steve Stuart Sunil Susan Sven "
    "Sylvia Tamara Tanya Tara Tariq Ted Teresa Tess Thomas Tilda Tomas Tony Tracy Trevor Tyler Uma "
    "Ursula Valerie Vanessa Vera Veronica Vikram Vincent Viola Violet Vivian Walter Wayne Wendy "
    "Wilma Winston Xavier Yara Yasmin Yusuf Yvonne Zara Zelda Zeno Zuri"
).split()
NAMES = sorted({*GIRLS, *BOYS, *MORE_NAMES})

COLORS = (
    "red blue green yellow orange purple pink brown black white grey gold silver turquoise violet "
    "teal beige crimson maroon navy indigo lilac scarlet olive cream magenta cyan lavender coral "
    "amber ivory mint peach"
).split()
COLOR_SHADES = ["dark", "light", "bright", "pale", "deep"]

ANIMALS = (
    "dog cat rabbit horse cow pig sheep goat duck goose chicken mouse hamster parrot owl eagle "
    "penguin dolphin whale shark turtle frog snake lizard lion tiger bear wolf fox deer elephant "
    "giraffe zebra monkey gorilla panda koala kangaroo camel llama hedgehog squirrel beaver otter "
    "seal walrus octopus crab butterfly bee ant spider snail bat badger mole raccoon skunk moose "
    "buffalo donkey pony swan peacock flamingo ostrich crow robin sparrow pigeon hawk falcon "
    "toad newt salmon goldfish lobster jellyfish starfish cheetah leopard jaguar lynx hyena "
    "meerkat lemur sloth armadillo hippo rhino crocodile alligator iguana gecko chameleon "
    "ferret weasel mink puma bison yak alpaca reindeer"
).split()

FOODS = (
    "pizza|pasta|rice|bread|cheese|soup|salad|chocolate|ice cream|apple pie|pancakes|noodles|"
    "curry|sushi|tacos|burritos|cake|cookies|waffles|honey|porridge|beans|lentils|tomato soup|"
    "fish and chips|dumplings|spaghetti|lasagne|falafel|hummus|olives|mushrooms|potatoes|carrots|"
    "peas|corn|bananas|apples|strawberries|cherries|grapes|mangoes|oranges|peaches|plums|melon|"
    "goulash|paella|risotto|ramen|omelette|sandwiches|toast|yoghurt|popcorn|nuts|muffins"
).split("|")

CITIES = (
    "London|Paris|Berlin|Madrid|Rome|Vienna|Lisbon|Dublin|Oslo|Helsinki|Stockholm|Copenhagen|"
    "Amsterdam|Brussels|Warsaw|Prague|Budapest|Athens|Zurich|Geneva|Munich|Hamburg|Cologne|Milan|"
    "Naples|Venice|Barcelona|Porto|Glasgow|Leeds|Bristol|Boston|Chicago|Seattle|Denver|Austin|"
    "New York|Toronto|Montreal|Vancouver|Tokyo|Kyoto|Seoul|Beijing|Shanghai|Delhi|Mumbai|Lagos|"
    "Cairo|Nairobi|Accra|Lima|Bogota|Santiago|Sydney|Melbourne|Auckland|Istanbul|Moscow|Kyiv"
).split("|")

THINGS = {
    "ball": "bounced the ball up and down",
    "kite": "flew the kite high in the sky",
    "hat": "put the hat on and smiled at the mirror",
    "balloon": "held the balloon by its long string",
    "car": "drove the car across the floor",
    "boat": "let the boat swim in the pond",
    "book": "read the book from the first page to the last",
    "box": "put all the best treasures into the box",
    "scarf": "put the scarf on and felt warm",
    "drum": "played the drum, boom, boom, boom",
    "doll": "danced around with the doll",
    "truck": "filled the truck with sand",
    "cup": "drank warm milk from the cup",
    "bike": "rode the bike up and down the road",
    "umbrella": "danced in the rain with the umbrella",
    "coat": "put the coat on and felt warm",
    "teddy bear": "hugged the teddy bear tightly",
    "train": "pulled the train all around the room",
    "whistle": "blew the whistle, tweet, tweet, tweet",
    "blanket": "built a cosy tent with the blanket",
    "bag": "carried the bag around all day",
    "robot": "made the robot walk and wave",
    "bell": "rang the bell, ding, dong, ding",
    "flute": "played a soft song on the flute",
    "shell": "held the shell to one ear and heard the sea",
    "lamp": "watched the lamp shine in the dark",
    "wagon": "pulled the wagon down the road",
}
