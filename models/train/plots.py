"""The plots of the little stories, in the notation of ``grammar.py``.

A line that starts with ``?`` is left out half of the time.  ``openings`` begin a story by
themselves; ``after_intro`` lines follow a general introduction of the hero.
"""

from __future__ import annotations

from dataclasses import dataclass

DAY = "[One day|One morning|One sunny day|One afternoon|One Saturday]"


@dataclass(frozen=True)
class Plot:
    """One plot: how it may begin, what happens, and what is learned."""

    openings: list[str]
    after_intro: list[str]
    body: list[str]
    morals: list[str]


WISH = Plot(
    openings=[
        "{Hero} wanted a {item}.",
        "{Hero} wanted a {item}.",
        "{Hero} [really wanted|wished for|dreamed of] a {item}.",
        DAY + ", {hero} saw a {item} in a shop window.",
        '"I [want|wish I had] a {item}," said {hero}.',
        "It was [almost|soon] {hero}'s birthday. {He} wanted a {item}.",
    ],
    after_intro=[
        "{He} wanted a {item} [more than anything|very much].",
        DAY + ", {he} saw a {item} in a shop window.",
    ],
    body=[
        "[{He} thought about it all day.|{He} could not stop thinking about it.|It was the most "
        "beautiful {thing} of all.|All the other children had one.]",
        '"{Parent}, may I have [the|that] {item}, please?" {he} asked.',
        "[{His} {parent} smiled.|{His} {parent} thought for a moment.|{His} {parent} looked at "
        '{him}.] "[You can earn it|You must help a little first|If you help me, you can have it]," '
        "{p_he} said.",
        "[So {hero} got to work.|{hero} said yes at once.|{hero} liked that idea.]",
        "{He} [washed the dishes|swept the floor|watered the plants|fed the hens] and [cleaned "
        "{his} room|picked apples|carried the wood|folded the clothes].",
        "?[It was hard work, but {he} did not give up.|{He} was tired, but {he} kept going.]",
        "?A {helper} came by and [asked|wanted to know] what {he} was doing. "
        '"I am working for my {item}," said {hero}.',
        "[At last|After a week|In the end], {his} {parent} [came home with a big box|gave {him} a "
        'big bag|held something behind {his} back]. "[This is for you|Surprise|You did so well]!" '
        "{p_he} said.",
        "It was the {item}! {hero} [jumped for joy|was so happy|laughed and clapped].",
        '"Thank you, {Parent}!" said {hero}.',
        "{He} took the {thing} to the {place} and {use}.",
        "?[Then|Soon] {friend} came to the {place}. {hero} let {f_him} play with the {thing}, too.",
    ],
    morals=[
        "{hero} learned that good things come to those who work for them.",
        "{hero} knew that [hard work|helping others] is worth it.",
        "{He} took good care of the {item} [for a long time|every day].",
    ],
)

LOST_THING = Plot(
    openings=[
        "{Hero} had a {item}. {He} took it everywhere.",
        "{Hero} had a {item}. It was {his} favourite {thing}.",
        "{Hero} loved {his} {item} [very much|more than anything].",
        DAY + ", {hero} could not find {his} {item}.",
        "{Hero} was sad. {His} {item} was gone.",
        "{Hero} lost {his} {item}.",
    ],
    after_intro=[
        "{He} had a {item} and took it everywhere.",
        DAY + ", {he} could not find {his} {item}.",
    ],
    body=[
        "[That morning|After breakfast|When {he} wanted to play], the {thing} was [not there|"
        "nowhere to be seen].",
        '"[Oh no|Oh dear]! Where is my {item}?" {he} cried.',
        "{He} looked under the {place2}, but the {thing} was not there.",
        "?{He} looked behind the door, but it was not there [either].",
        "{He} went to the {place} [to look for it|and looked everywhere], but {he} could not find "
        "it.",
        "[{hero} sat down and began to cry.|{hero} felt very sad.|A tear ran down {his} face.]",
        "[Just then|Then], a {helper} came by. "
        '"[Why are you sad|What is wrong|Why are you crying]?" asked the {helper}.',
        '"I lost my {item}," said {hero}.',
        '"[Do not worry|Do not cry]. I will help you [look for it|find it]," said the {helper}.',
        "They looked [together|up and down|in every corner]. "
        "[Suddenly|After a while|Then], the {helper} saw something {color} [in the tall grass|behind "
        "a big stone|between the flowers|next to a tree].",
        "It was the {item}!",
        '"You found it! Thank you[| so much]!" said {hero}, and {he} hugged the {helper}.',
        "?[They played together until the sun went down.|They shared some cookies and laughed.]",
        "?At home, {hero} told {his} {parent} [about the kind {helper}|all about it].",
    ],
    morals=[
        "[From then on|After that], {hero} always put the {thing} [back in its place|in a safe "
        "place].",
        "{hero} learned that [it is good to ask for help|friends help each other].",
        "{hero} and the {helper} [became good friends|were friends from that day on].",
    ],
)

LOST_BABY = Plot(
    openings=[
        DAY + ", {hero} found a little {baby} [in the {place}|near the {place}].",
        DAY + ", {hero} heard a small sound in the {place}.",
        "{Hero} saw a little {baby} near the {place}. It was all alone.",
        "It was a [cold|rainy|windy] day. {hero} was walking near the {place}.",
        "{Hero} loved animals.",
    ],
    after_intro=[
        DAY + ", {he} heard a small sound in the {place}.",
        DAY + ", {he} went for a walk near the {place}.",
    ],
    body=[
        "[Under a bush|Behind a big stone|In the grass] sat a little {baby}. It was [cold and "
        "scared|lost and hungry|shaking and sad].",
        '"[Hello|Hi], little {baby}. [Are you lost|Where is your mother|Do not be afraid]?" said '
        "{hero} [softly|in a soft voice].",
        "?The {baby} looked at {him} with big eyes.",
        "{hero} [gave it some water|gave it a bit of bread|put {his} scarf around it] and [held it "
        "gently|picked it up carefully].",
        '"I will help you [find your mother|get home]," {he} [said|promised].',
        "{hero} carried the {baby} [along the path|over the hill|past the old tree] and called, "
        '"Is this your baby?"',
        '{He} asked a {helper}. "[I saw its mother|Its mother is waiting|Look] [near the lake|by '
        'the old bridge|behind the barn]," said the {helper}.',
        "{hero} [ran|walked] there as fast as {he} could.",
        "There was the mother! She was looking for her baby [everywhere|and was so worried].",
        "The {baby} ran to her [and they were so happy|as fast as it could].",
        "?The mother looked at {hero} as if she wanted to say thank you.",
        "{hero} [waved goodbye|smiled] and went home. {He} told {his} {parent} [all about it|what "
        "had happened].",
        '"[I am proud of you|You were very kind|You did the right thing]," said {his} {parent}.',
    ],
    morals=[
        "{hero} learned that it feels good to help [others|someone small].",
        "Every time {he} passed the {place}, the little {baby} came to say hello.",
        "Being kind [makes everyone happy|is never wrong].",
    ],
)

FEAR = Plot(
    openings=[
        "{Hero} was afraid of {fear}.",
        "{Hero} was a little scared. {He} was afraid of {fear}.",
        "{Hero} could not sleep. {He} was afraid of {fear}.",
    ],
    after_intro=[
        "But {he} was afraid of {fear}.",
        "There was only one thing: {he} was afraid of {fear}.",
    ],
    body=[
        "[Every time {he} thought of it, {his} heart went boom, boom.|{He} always wanted to hide "
        "under the {place2}.|It made {his} knees shake.]",
        DAY + ', {hero} told {his} {parent} about it. "I am scared of {fear}," {he} said.',
        '"[Everyone is scared sometimes|I was scared, too, when I was little|That is all right]," '
        "said {his} {parent}.",
        '"[Take a deep breath|Hold my hand|Count to three] and [think of something nice|sing a '
        'little song|be brave]," {p_he} said.',
        "?{hero} [nodded|thought about it for a long time].",
        "[That evening|The next day|Later], {friend} came running. "
        '"{hero}, please help! [My {thing} is out there and I cannot get it|I left my {item} '
        'outside]!"',
        "But out there was {fear} again.",
        "{hero} [closed {his} eyes|stood very still]. {He} took a deep breath and sang a little "
        "song.",
        "[Step by step|Slowly, slowly|One foot after the other], {he} went on, and {he} found the "
        "{item}.",
        '"[You did it|You are so brave]!" said {friend}. "Thank you!"',
        '{hero} [laughed|smiled]. "It was not so bad [after all|at all]," {he} said.',
        "?{His} {parent} gave {him} a big hug.",
    ],
    morals=[
        "{hero} learned that being brave means trying even when you are scared.",
        "From that day on, {hero} was not afraid of {fear} any more.",
        "And when {hero} felt scared again, {he} sang {his} little song.",
    ],
)

SHARING = Plot(
    openings=[
        "{Hero} and {friend} were [best friends|good friends].",
        "{Hero} and {friend} were playing in the {place}.",
        "{Hero} had a new {item}. {He} did not want to share it.",
        "{Hero} got a {item} from {his} {parent}.",
        DAY + ", {hero} took {his} {item} to the {place}.",
    ],
    after_intro=[
        DAY + ", {he} took {his} new {item} to the {place}.",
        "{His} {parent} gave {him} a {item}.",
    ],
    body=[
        "{hero} {use}. It was so much fun.",
        '{friend} saw the {item}. "[May I play with it|Can I have a turn|May I try it], '
        'please?" {f_he} asked.',
        '"No! It is mine!" said {hero}, and {he} [held the {thing} tightly|turned away].',
        "{friend} [was sad|looked down] and [went away|sat down under a tree].",
        "{hero} played alone [for a while|all morning], but [it was not fun any more|soon {he} was "
        "bored].",
        "?{He} looked at {friend}. {friend} looked so lonely.",
        '{hero} [asked {his} {parent} what to do|went to {his} {parent}]. "[A thing is more fun '
        'when you share it|Two can have more fun than one]," said {his} {parent}.',
        'So {hero} went to {friend}. "I am sorry. [Let us play together|You can have a turn now]," '
        "{he} said.",
        '{friend} smiled. "[Thank you|That is very nice], {hero}!" {f_he} said.',
        "They took turns with the {item} and [laughed a lot|played until the sun went down].",
        "?{friend} brought some [cookies|apples|strawberries] and shared them with {hero}.",
    ],
    morals=[
        "{hero} learned that sharing is [fun|better than playing alone|a good thing].",
        "[From then on|After that], the two friends shared everything.",
    ],
)

STUCK = Plot(
    openings=[
        DAY + ", {hero} was playing with {his} {item} in the {place}.",
        "{Hero} was playing in the {place} with a {item}.",
        "It was a windy day. {hero} took {his} {item} to the {place}.",
        "{Hero} loved to play with {his} {item}.",
    ],
    after_intro=[DAY + ", {he} was playing with {his} {item} in the {place}."],
    body=[
        "[Suddenly|Then], a strong wind came, and [whoosh|hop], the {thing} flew up and got stuck "
        "in a tall tree.",
        '"[Oh no|Oh dear], my {thing}!" cried {hero}.',
        "{He} jumped as high as {he} could, but the tree was too tall.",
        "?{He} threw a small stick at it, but the {thing} did not move.",
        "?{He} shook the tree, but the {thing} stayed where it was.",
        'A {helper} came along the path. "[Can I help you|What happened|Do you need help]?" asked '
        "the {helper}.",
        '"My {item} is stuck in the tree," said {hero}.',
        'The {helper} [thought for a moment|looked up]. "[I have an idea|I know what to do]. '
        '[You can stand on my back|We need a long branch|Let us work together]," {h_he} said.',
        "[They tried once, and they tried twice.|{hero} was careful and did just what the {helper} "
        "said.] [At last|Then|And then], the {item} came down!",
        '"[Hooray|We did it|Thank you so much]!" said {hero}.',
        "{hero} {use}, and the {helper} [watched and laughed|clapped].",
        "?[Later|After that], they sat in the grass and ate [apples|cookies|berries] together.",
    ],
    morals=[
        "{hero} learned that two can do what one cannot.",
        "{hero} was glad to have a [good|new] friend.",
        "[When we work together, nothing is too hard.|Together, everything is easier.]",
    ],
)

CAKE = Plot(
    openings=[
        "{Hero} wanted to make a {food} for {his} {parent}.",
        "It was the birthday of {hero}'s {parent}. {hero} wanted to make a {food}.",
        DAY + ", {hero} wanted to bake a {food}.",
        "{Hero} was hungry. {He} wanted to make a {food}.",
    ],
    after_intro=[
        DAY + ", {he} wanted to make a {food} for {his} {parent}.",
        "It was {his} {parent}'s birthday, and {he} wanted to make a {food}.",
    ],
    body=[
        "{He} [put on a {color} apron|got a big {color} bowl] and [took out the flour|washed {his} "
        "hands].",
        "[But there was a problem.|But something was missing.|Then {he} looked in the kitchen.] "
        "There were no eggs.",
        '"[Oh no|Oh dear]! I cannot make a {food} without eggs," said {hero}.',
        'So {he} went to the {helper} next door. "[Hello|Good morning]! [Do you have some eggs|May '
        'I have two eggs], please?" {he} asked.',
        '"[Of course|Yes]! [Here you are|Take as many as you need]," said the {helper}.',
        '"Thank you! Please come [to us in the afternoon|and eat with us]," said {hero}.',
        "?On the way home, {he} walked very slowly, so that the eggs would not break.",
        "{He} [mixed everything|stirred and stirred] and put it into the oven.",
        "[Soon the whole house smelled so good.|It smelled so good.] The {food} was [golden|warm] "
        "and [soft|sweet|perfect].",
        '[In the afternoon|Then], {his} {parent} came home. "[Surprise|Look what I made for you]!" '
        "{he} said.",
        '"What a wonderful {food}! [Thank you|I love it], {hero}," said {his} {parent}.',
        "The {helper} came, too, and they all ate the {food} together.",
        "?There was not a crumb left.",
    ],
    morals=[
        "{hero} learned that food tastes best when you share it.",
        "Making others happy made {hero} happy, too.",
    ],
)

RAIN = Plot(
    openings=[
        "{Hero} and {friend} wanted to have a picnic.",
        "It was a sunny day. {hero} wanted to go to the {place} with {friend}.",
        DAY + ", {hero} and {friend} wanted to go to the {place}.",
        '{Parent} said, "{hero}, let us go to the {place} today." {hero} was happy and called '
        "{his} friend {friend}.",
    ],
    after_intro=[
        DAY + ", {he} wanted to go to the {place} with {his} friend {friend}.",
    ],
    body=[
        "They packed [bread and apples|sandwiches and juice|cookies and milk] and a {item}.",
        "[But then|Just then|But soon], big dark clouds came, and it began to rain.",
        '"[Oh no|Oh dear]! Now we cannot go," said {friend}. {F_he} was [sad|very sad].',
        "{hero} looked out of the window. [Drip, drop, drip, drop.|The rain did not stop.]",
        'Then {he} had an idea. "We can have our picnic [inside|right here|at home]!" {he} said.',
        "They put a blanket on the floor and [built a little tent|put all the food on it].",
        "?{His} {parent} [brought warm tea|gave them a little lamp|sang a song with them].",
        "They ate and [told funny stories|sang songs|played games]. Then {hero} {use}.",
        '{friend} laughed. "This is [even better than|as good as] the {place}!" {f_he} said.',
        "[When the rain stopped|After the rain], they saw a big rainbow [in the sky|over the "
        "{place}].",
        "?They ran outside and jumped into the puddles, splash, splash, splash.",
    ],
    morals=[
        "{hero} learned that a rainy day can be fun, too.",
        "With a good friend, every day is a good day.",
    ],
)

HONEST = Plot(
    openings=[
        DAY + ", {hero} was playing in the house.",
        "{Hero} was [running|jumping|dancing] in the house.",
        "{Parent} had a {color} vase. {hero} knew that {he} must not touch it.",
        '{Parent} said, "{hero}, please do not run in the house."',
    ],
    after_intro=[DAY + ", {he} was [running|jumping|dancing] in the house."],
    body=[
        "[Bump! Crash!|Crash!|Bump!] {hero} hit the table, and the {color} vase fell down and "
        "broke.",
        '"[Oh no|Oh dear]," {he} whispered. "[What have I done|What shall I do]?"',
        "{He} [was scared|felt very bad]. {He} wanted to hide under the {place2}.",
        '{friend} saw it. "[You can say it was the cat|Just say nothing]," said {friend}.',
        "{hero} thought about it. [But that would be a lie|But that did not feel right|But {he} did "
        "not want to lie].",
        'So {he} went to {his} {parent}. "I broke the {color} vase. I am so sorry," {he} said.',
        "?It was very quiet for a moment.",
        '{His} {parent} [sat down next to {him}|took {his} hand]. "[I am a little sad about the '
        'vase|It was only a vase], but I am [glad|proud] that you told the truth," {p_he} said.',
        "They [picked up the pieces|swept the floor] together. Then they [glued the vase|made a new "
        "vase out of clay].",
        "?The vase looked a little funny now, but they liked it even more.",
        "{hero} [hugged {his} {parent}|felt light and happy again].",
    ],
    morals=[
        "{hero} learned that it is [always better|best] to tell the truth.",
        "[From then on|After that], {hero} was more careful, and {he} always told the truth.",
    ],
)

SKILL = Plot(
    openings=[
        "{Hero} wanted to learn to {skill}.",
        "{Hero} could not {skill}.",
        "{Hero} [wished|wanted] to {skill} like {friend}.",
        "All the others could {skill}, but {hero} could not.",
    ],
    after_intro=["{He} wanted to learn to {skill}.", "But {he} could not {skill}."],
    body=[
        DAY + ", {he} went to the {place} and tried, but it did not work.",
        "[{friend} laughed at {him}.|Everyone else was so good at it.|{He} tried again, but it went "
        "wrong again.] {hero} [felt sad|wanted to give up|sat down and sighed].",
        '"I will never learn to {skill}," {he} said.',
        'A [wise|kind|friendly] {helper} heard {him}. "[Nobody can do it the first time|I had to '
        'learn it, too]," said the {helper}.',
        '"[Try a little every day|Come here every morning], and I will [show you|help you]."',
        '?{hero} [dried {his} tears|looked up and smiled]. "Really?" {he} asked.',
        "So {hero} practised on Monday, on Tuesday and on Wednesday.",
        "[Each day it went a little better.|Sometimes it went wrong, but {he} tried again.]",
        '?"Very good! Do not give up," said the {helper}.',
        "[On Sunday|At last|And one day], {he} did it! {hero} could {skill}!",
        '"[Look at me|I can do it|I did it]!" {he} [called|cried|shouted].',
        '{friend} came and [clapped|cheered]. "[That was great|You are so good]!" {f_he} said.',
        "?{hero} thanked the {helper} and smiled from ear to ear.",
    ],
    morals=[
        "{hero} learned that you must [never give up|try and try again].",
        "{hero} knew now: practice makes it better every day.",
    ],
)

GARDEN = Plot(
    openings=[
        "{Hero} found a [small|tiny] seed.",
        DAY + ", a {helper} gave {hero} a [small|tiny] seed.",
        "{Hero} wanted to grow a {flower}.",
        "{Hero} had a little garden.",
    ],
    after_intro=[
        DAY + ", {he} found a tiny seed.",
        DAY + ", {his} {parent} gave {him} a tiny seed.",
    ],
    body=[
        "{He} [made a small hole|dug a little hole] near the {place} and put the seed into it.",
        "{He} gave it some water and [waited|sat down to wait].",
        "[But nothing happened.|The next day, there was nothing to see.|{He} looked and looked, but "
        "nothing came up.]",
        '"Why does it not grow?" {he} asked {his} {parent}.',
        '"A seed needs [water, sun and time|a little time]. You must [be patient|wait]," said '
        "{his} {parent}.",
        "So {hero} watered the seed every day. {He} [sang to it|talked to it], too.",
        "?[Rain came and sun came.|One week went by, and then another.]",
        '?{friend} said, "[It will never grow|You should stop waiting]." But {hero} did not give '
        "up.",
        "[Then one morning|At last], there was a tiny green leaf! [{hero} jumped for joy.|{hero} "
        "could not believe it.]",
        "The plant grew [and grew|taller and taller], and [one day|in the summer] there was a "
        "beautiful {color} {flower}.",
        '"[Look|Come and see], {Parent}! [My {flower} is here|It has a {color} flower]!" {he} '
        "called.",
        '{His} {parent} smiled. "[You waited so well|That is the prettiest {flower} I have ever '
        'seen]," {p_he} said.',
        "?Even the bees and the butterflies came to see the {color} {flower}.",
    ],
    morals=[
        "{hero} learned to be patient.",
        "{hero} knew now that good things need time.",
    ],
)

LONELY = Plot(
    openings=[
        "{Hero} was [lonely|sad]. {He} had no friends.",
        "{Hero} was new in the [town|village|school].",
        "{Hero} had no one to play with.",
        "{Hero} wanted a friend.",
    ],
    after_intro=["But {he} was lonely, because {he} had no friends.", "{He} wanted a friend."],
    body=[
        "Every day, {he} sat alone near the {place} and [watched the others|looked at the clouds].",
        '?"I wish I had a friend," {he} [said softly|thought].',
        DAY + ", {hero} took {his} {item} to the {place}.",
        "There {he} saw {friend}, who was [all alone, too|sitting alone under a tree].",
        "{hero} was shy. [{His} heart went boom, boom.|{He} did not know what to say.] But {he} "
        '[walked over|took a deep breath] and said, "Hello. [I am {hero}|My name is {hero}]."',
        '"Hi, I am {friend}," said {friend}. "[I like your {item}|What a nice {thing}]!"',
        '"[Do you want to play with me|Shall we play together]?" asked {hero}.',
        '"[Yes, please|I would love to|Oh, yes]!" said {friend}.',
        "So {hero} {use}, and then it was {friend}'s turn.",
        "They [laughed so much|played and talked] until [it was time to go home|the sun went down].",
        '?"Will you come again tomorrow?" asked {friend}. "Yes!" said {hero}.',
        'At home, {hero} told {his} {parent}, "I have a friend now!" {His} {parent} [gave {him} a '
        "hug|was so glad].",
    ],
    morals=[
        "{hero} learned that one little hello can [make a friend|change a lot].",
        "From that day on, {hero} and {friend} [met every day|were best friends].",
    ],
)

LOST_WAY = Plot(
    openings=[
        "{Hero} was lost in the forest.",
        DAY + ", {hero} went for a walk in the forest.",
        '{Parent} said, "{hero}, do not go too far."',
        "{Hero} loved to explore.",
    ],
    after_intro=[DAY + ", {he} went for a walk in the forest."],
    body=[
        "{hero} followed a [pretty|big] {color} butterfly, farther and farther [into the trees|away "
        "from home].",
        "When {he} looked up, " + "{he} did not know where {he} was.",
        '"[Hello? Is anybody there|Oh no, where am I]?" {he} called.',
        "?The trees were tall, and it was getting dark.",
        'A {helper} [came out from behind a tree|heard {him} and came closer]. "[Are you '
        'lost|Where do you live]?" asked the {helper}.',
        '"[Yes, I want to go home|I cannot find my way home]," said {hero}.',
        '"[Do not worry|Come with me]. [First we go to the river|We follow the river], then '
        '[over the bridge|past the old tree]," said the {helper}.',
        "They walked and [talked|sang], and {hero} was not so afraid any more.",
        "?On the way, the {helper} showed {him} where the sweet berries grow.",
        "[At last|Soon], {hero} saw the lights of {his} house. {His} {parent} was standing at the "
        "door.",
        '"{hero}! [There you are|I was so worried]!" said {his} {parent} and [hugged '
        "{him}|took {him} in both arms].",
        '{hero} turned around. "Thank you, kind {helper}!" {he} [said|called].',
        "?The {helper} [waved|smiled] and went back into the forest.",
    ],
    morals=[
        "{hero} learned [to stay close to home|not to go too far alone].",
        "{hero} never forgot the kind {helper}.",
    ],
)

SICK = Plot(
    openings=[
        "{Hero} and {friend} played together every day.",
        "{hero}'s friend {friend} was sick, and {he} was worried.",
        DAY + ", {hero} waited for {his} friend {friend}, but {friend} did not come.",
    ],
    after_intro=[
        DAY + ", {he} waited for {his} friend {friend}, but {friend} did not come.",
    ],
    body=[
        '"{friend} is sick [today|and must stay in bed]," said {his} {parent}.',
        '{hero} [was sad|felt sorry for {friend}]. "[What can I do|How can I help]?" {he} asked.',
        '"[You could bring some soup|You could cheer {f_him} up]," said {his} {parent}.',
        "So {hero} made [a pot of warm soup|some warm soup] and [picked some flowers|painted a "
        "picture].",
        "{He} also took {his} best {item}.",
        "[On the way, it began to rain, but {hero} did not mind.|The way was long, but {hero} did "
        "not stop.|The wind was cold, but {hero} walked on.]",
        '?A {helper} asked, "Where are you going in this weather?" "To my sick friend," said '
        "{hero}.",
        "{friend} was lying in bed and looked [pale|very tired].",
        '"[I brought you something|Look what I have for you]," said {hero}.',
        "{friend} ate the soup. [It was warm and good.|It tasted so good.] Then {hero} gave {f_him} "
        "the {item} to play with.",
        '{friend} smiled. "[I feel better already|You are the best friend], {hero}," {f_he} said.',
        "[After three days|A few days later], {friend} was well again, and they [ran|went] to the "
        "{place} together.",
    ],
    morals=[
        "{hero} learned that a good friend is the best medicine.",
        "A true friend is there [on bad days, too|when you need one].",
    ],
)

PLOTS = [
    WISH, WISH, LOST_THING, LOST_BABY, FEAR, SHARING, STUCK, CAKE, RAIN, HONEST, SKILL, GARDEN,
    LONELY, LOST_WAY, SICK,
]  # fmt: skip
