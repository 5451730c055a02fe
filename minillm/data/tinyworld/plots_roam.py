"""Plots on the move: something lost, a way lost, a fear, a race, a rainy day."""

from minillm.data.tinyworld.tale import Tale
from minillm.data.tinyworld.world import COLOURS, PLACE, PLACES


def lost_thing(t: Tale) -> None:
    """Put down in one of three places, missed at home, found by going the same way back."""
    a, *_ = t.cast(3)
    t.things(1)
    if t.dice.chance(0.3):
        t.facts |= {"x": a.treasure, "x_": a.treasure.split()[-1]}
    trip = t.places(3)
    t.facts["lost"] = lost = t.dice.pick(trip)
    t.weather()
    t.fact("a")
    t.say("{a} [took|carried|had] a @size {x} [with {a.him} |]everywhere[, even to bed|, rain or "
            "shine|].",
          "[{c} had once given {a} a @size {x}|{a} owned a @size {x}], and {a.he} [loved "
            "it|never left it at home].",
          "[Nothing|No other thing] made {a} so @glad as {a.his} @size {x}[, which {a.he} always "
            "carried|].")
    _visit_places(t, trip, lost)
    t.say("[Back home|Home again|At {a.his} own door], {a} [stopped|stood still|turned pale]. "
            "The {x} was [gone|not there|missing]!",
          "@soon, {a} [came|got|was] home and [saw|found|noticed] that the {x} was [gone|missing].")
    t.say('"@oh, my {x_}!" {a} [cried|said]. "[Let us|We will] go back the way you came," {b} '
            "@said.",
          '"[Do not cry|Keep calm|Think]," {b} @spoke. "[Where did you go last|Where were you '
            'last]?"')
    _search_back(t, trip, lost)
    t.say("{a} [hugged|held|kissed] the {x_} and @smiled. [@evening, {a.he} gave {b} @snack and "
            "@snack|Then they shared {b.serving} and @snack].",
          "[@evening, {a}|{a}] tied a {a.colour} string to the {x_}, so that it [could|would] "
            "never be left behind again.",
          '"[@thanks|I will be more careful now]," {a} said to {b}. They [went|walked] home '
            "[together|side by side] and shared @snack and @snack.")


def _visit_places(t: Tale, trip: list, lost) -> None:
    orders = (
        "[First|To begin with], {a.he} @went to {p} to {p.errand}.",
        "[Then|Next|After that], {a.he} [had|@went to {q}, because {a.he} had] to "
        "{q.errand}{rest}.",
        "[Last of all|Finally|At the end], {a.he} [went|walked|had to go] to {r} to {r.errand}.",
    )
    t.facts["rest"] = ""
    for place, order in zip(trip, orders, strict=True):
        t.say(order.replace("[had|@went to {q}, because {a.he} had]", "@went to {q}, because "
            "{a.he} had"))
        if place is lost:
            t.say("[There|While {a.he} was there], {a.he} [put|laid] the {x_} {lost.spot}[ for a "
                    "moment| to have a rest|].",
                  "The {x_} was in the way, so {a.he} [put|left|laid] it {lost.spot}.")
        elif place is not trip[-1]:
            t.extra()


def _search_back(t: Tale, trip: list, lost) -> None:
    for place in reversed(trip):
        t.facts["here"] = place
        if place is lost:
            break
        t.say("{here.at}, they @looked [high and low|everywhere|in every corner], but [found "
                "nothing|it was not there].",
              "They @went to {here}, but [nobody had seen it|there was no {x_}].",
              "They asked @seen near {here}, but [nobody had seen it|it was not there].")
    t.say("But {lost.at}, {lost.spot}, [lay|was] the {x}[, safe and sound|, safe and dry|]!",
          "They came to {lost}, and {b} [pointed|called out]. There was the {x}, {lost.spot}[, "
            "safe and dry|]!")


def lost_way(t: Tale) -> None:
    """Three landmarks told in advance lead to a far house, in that order; the last is near it."""
    _, b, _ = t.cast(3)
    t.things(1)
    t.facts["r"] = PLACE[b.near]
    t.facts["p"], t.facts["q"] = t.dice.sample([p for p in PLACES if p.name != b.near], 2)
    t.weather()
    t.fact("b")
    t.say("{c} [asked|begged] {a} to [bring|carry|take] a @size {x} [and @pack |]to {b}.",
          "{a} [wanted|had] to [bring|carry|take] {b} a @size {x} [from {c}|and @pack].")
    t.maybe("{a} had never [been there|gone there] alone[ and asked {c} for the way|].",
            '"[How do I get there|Which way is it|Where must I go]?" {a} asked {c}.')
    t.say('"[Look for|Find|Start at] the {p.feature}," {c} @spoke. "[Then|After that] go on to '
            'the {q.feature}, and [last|in the end|then] to the {r.feature}."',
          '"[Remember|Mark] three things," {c} @spoke. "First the {p.feature}, then the '
            '{q.feature}, and last the {r.feature}."')
    t.say("[But then|Soon|But after a while], {a.he} [stopped to look at|ran after|talked "
          "to|followed] @seen "
            "@spot and [lost the path|no longer knew the way|took a wrong turn].",
          "[But|At first all went well, but then] the path [split in two|ended at a hedge|was "
            "full of water], and {a} was [quite |]lost.")
    t.extra()
    t.maybe("{a} [sat down|stood still|took a deep breath], [ate @snack|looked at @seen @spot] "
              "and [thought of|tried to remember] {c}'s words.",
            '"[I am lost|Oh dear|Now I must think]," [whispered|thought|said] {a}. "What did {c} '
              'say?"')
    t.say("@soon, {a.he} came to {p}, and there was the {p.feature}!",
          "{a.he} [climbed a wall|looked around|turned left|asked @seen] and saw the {p.feature} "
            "{p.at}.")
    t.say("From there[ it was easy. Then|] {a.he} [found|reached|saw] the {q.feature} {q.at}[, "
            "just as {c} had told {a.him}|].")
    t.say("[At last|In the end|Finally], {a.he} @went past the {r.feature} {r.at} and [knocked "
            "at {b}'s door|saw {b}].")
    t.say('"You [found|know] the way [alone|all alone]!" said {b}, and [took|unpacked|admired] '
            "the {x}. {a} would never forget the {p.feature}, the {q.feature} and the {r.feature}.",
          '{b} was @very @glad with the {x} and gave {a} {b.serving} and @snack. "{p.feature}, '
            '{q.feature}, {r.feature}: [I know|now I know] the way," {a} @spoke.',
          "{b} [took|admired] the {x} and gave {a} @snack and @snack[, with a little {b.food}|]. "
            "Together they [@went|walked] back past the {r.feature}, the {q.feature} and the "
            "{p.feature}.")


# fear: what must be done, how the fear shows, what helps
_FEARS = {
    "thunder": (
        "carry a @size {x} through the storm to {p}",
        "thunder rolled [over the roofs|again and again]",
        "sing louder than the thunder",
    ),
    "the dark": (
        "fetch a @size {x} from the old cellar near {p}",
        "it was as dark as a sack [down there|on the stairs]",
        "hold a candle and take one step at a time",
    ),
    "deep water": (
        "row a @size {x} across the deep river near {p}",
        "the water looked deep and [black|cold]",
        "look at the far bank and not at the water",
    ),
    "high places": (
        "bring a @size {x} down from the tall tower near {p}",
        "the stairs seemed to [reach the clouds|have no end]",
        "look up and never down",
    ),
    "spiders": (
        "find a @size {x} in the old shed near {p}",
        "a fat spider sat [on the door|in its web]",
        "say good day to each spider",
    ),
    "geese": (
        "bring a @size {x} past the geese to {p}",
        "@number geese [hissed|stood] in the way",
        "walk slowly and stand tall",
    ),
    "bees": (
        "fetch a @size {x} from under the bee hives near {p}",
        "the bees [hummed|buzzed] all around",
        "stand still and hum with the bees",
    ),
    "fog": (
        "carry a @size {x} through the fog to {p}",
        "the fog was so thick that [no path|nothing] could be seen",
        "follow the wall and count the steps",
    ),
}


def fear(t: Tale) -> None:
    """Somebody does the very thing they fear, with one good piece of advice."""
    a, *_ = t.cast(3)
    t.things(1)
    t.places(1)
    task, scene, advice = _FEARS[a.fear]
    t.let(task=task,
          scene=scene,
          advice=advice,
          steps="[twenty|thirty|forty|fifty|sixty|a hundred]")
    t.say("{a} the {a.kind} was [afraid of|scared of] {a.fear}[, and everyone knew it|].",
          "{a} the {a.kind} [feared|was afraid of] nothing at all, [except|but for] {a.fear}.",
          "There was one thing that {a} the {a.kind} [feared|could not bear], and that was "
            "{a.fear}.")
    t.fact("b")
    t.say("@when, {c} [fell ill|hurt a leg|had no time] and asked {a} to {task}.",
          "@when, there was [nobody else|no one but {a}] to {task} for {c}.",
          "@when, {a} had to {task}, [because|for] {c} had [asked for|promised] it.")
    t.say("On the way, {a.he} passed @seen @spot and [thought only of {a.fear}|wished to be at "
            "home].",
          "{a.he} [packed|took] @pack and @pack and [went|hurried|ran|walked] [off|away] [with a "
          "heavy heart|with "
            "cold feet|without a word].")
    t.say("[Then|Now|There] {scene}. {a} [shook all over|turned pale|could not move|wanted to "
            "run away].",
          "[Soon|Before long|In no time], {scene}, and {a} [trembled|stopped|felt {a.his} knees "
          "shake].")
    t.say('"[I cannot do it|It is too much for me|I want to go home]," {a} [whispered|said in a '
            "small voice]. [But then|Just then] {b} came by with @pack.",
          '"What is [wrong|the matter]?" asked {b}, who came by with @pack. "I am afraid of '
            '{a.fear}," {a} @sighed.')
    t.say('"I know a trick," {b} @spoke. "[You only have to|Just] {advice}."',
          '"When I am [afraid|scared] of {b.fear}, I count to {steps}," {b} @spoke. "And you '
            'must {advice}."')
    t.say("{a} [nodded|closed both eyes|took a deep breath] and began to {advice}[, just as {b} "
            "had said|].")
    t.say("[@soon|After {steps} steps], {a.he} felt [better|braver|calm] [and thought of "
            "{a.food}|and even saw @seen|and could smell @smell].")
    t.say("[@soon|Then] it was done, and {c} gave {a.him} @snack and @snack.",
          "@soon, {a} was back. {b} [cheered|clapped] and gave {a.him} {a.serving} and @snack.")
    t.say("{a} was still a little [afraid of|scared of] {a.fear}, but now {a.he} knew [what to "
            "do|a good trick].",
          '"[Next time|Tomorrow] I will do it [alone|again]," {a} said[ @how|], and '
            "[everyone|{b}] believed {a.him}.",
          "{a} [gave|brought] {b} @snack the next day. It was for the good advice.")


def race(t: Tale) -> None:
    """Three racers; the fastest stops to help, and the prize follows from that."""
    t.cast(3)
    t.places(2, outdoors=True)
    t.facts["i"], t.facts["j"], t.facts["k"] = t.dice.sample(COLOURS, 3)
    t.let(car="[cart|sledge|scooter|barrow|bicycle|wagon|tricycle]",
          prize="@colour [ribbon|cup|flag|medal|scarf|hat]")
    t.weather()
    t.say("[It was the day of the great race|Everyone came to see the race] from {p} to {q}.",
          "{a}, {b} and {c} [planned|agreed on|had] a race from {p} to {q}.")
    t.say("{a} had a @size {i} {car}, {b} had a {j} one, and {c} [came with|had] a @size {k} one.",
          "{a}'s @size {car} was {i}, {b}'s was {j}, and {c}'s was {k}.")
    t.fact("a")
    t.say("The prize was a {prize}[ and @snack|, together with @snack and @snack|].",
          "[Whoever won|The winner] would get a {prize} and @snack.")
    t.maybe('"[Ready, steady, go|One, two, three, go|Off you go]!" [called|shouted|cried] '
              "@number @mood [children|farmers|sailors|painters][, and off they went|].")
    t.say("[At first|At the start], {c} was in front, but [@soon|near the {p.feature}] the {i} "
            "{car} [took the lead|passed the {k} one].",
          "The {i} {car} [shot|flew] ahead[ like an arrow|], and {c} came [second|next][, close "
            "behind|].")
    t.say("They [raced|rattled|rolled|flew] past @seen @spot.")
    t.say("[Then|Suddenly], {b} [hit a stone|lost a wheel|rolled into a ditch|ran into a fence], "
            "and the {j} {car} lay on its side.")
    t.say('{a} [heard it|looked back] and [stopped|turned round|braked]. "[Are you hurt|Can you '
            'stand]?" {a.he} @asked.',
          '{a} could [see|almost touch] the {q.feature}, but {a.he} [stopped|turned back]. "I am '
            'coming!" {a.he} called.')
    t.say("[Together they|{a} and {b}] [lifted|pulled|pushed] the {j} {car} [back onto the "
            "path|up again], [while {c} rolled past|and {c} passed them].")
    t.say("{c} [reached|came to] {q} first, and {a} and {b} [came in|arrived] [side by "
            "side|together].",
          "So {c} won[, and the {k} {car} stood [alone |]beside the {q.feature}|].")
    t.say('But {c} [gave|handed] the {prize} to {a}. "[You were the fastest until you '
            'stopped|You stopped to help]," {c} @spoke.',
          '"[This is not right|No]," {c} @spoke. "The {prize} belongs to {a}[, who stopped to '
            'help|]."')
    t.maybe("{a} [@smiled|blushed] and shared {a.food} and @snack with {b}[ and {c}|].",
            "[Everyone clapped|The crowd cheered|All of them cheered], and {b} cheered "
              "[loudest|most] of all.",
            "{a} kept the {prize} in {a.own}, and {b} [drew|wrote] the words THANK YOU on the "
              "{j} {car}.")


# the plan for outdoors, what became of it indoors, and what the thing x was in it
_PLANS = [
    ("have a picnic", "ate the picnic on the floor", "the {x} was the sun"),
    ("sail toy boats", "sailed the boats in the bath tub", "the {x} was the harbour"),
    ("play ball", "played ball in the long hall", "the {x} was the goal"),
    ("fly kites", "painted kites on a long paper", "the {x} held the paper down"),
    ("put up a tent", "made a tent of two chairs and a sheet", "the {x} marked the door"),
    ("dance", "danced round the kitchen table", "they danced with the {x} too"),
    ("put on a play", "played it in the front room", "the {x} was the dragon"),
    ("hunt for treasure", "hid treasures under the chairs", "the {x} was the best of them"),
]


def rainy_day(t: Tale) -> None:
    """A plan for outdoors becomes a plan for indoors; what was packed is used in another way."""
    t.cast(3)
    t.things(2)
    t.places(1, outdoors=True)
    plan, instead, use = t.dice.pick(_PLANS)
    t.let(plan=plan, instead=instead, use=use)
    t.say("{a}, {b} and {c} [wanted|had planned] to {plan} {p.at} [that day|on Sunday|on "
            "Saturday|in the afternoon].",
          "[All week|For days] {a} had [planned|been waiting] to {plan} {p.at} with {b} and {c}.")
    t.fact("b")
    t.say("{a} [packed|brought] a @size {x} and @snack, {b} [packed|brought] a @size {y} and "
            "@snack, and {c} [had|came with] @snack.")
    t.say("[But @soon|But then|Just then], [it began to rain|rain began to fall|big drops "
            "fell][, softly at first| and it did not stop|].")
    t.say('"[Our plan is spoiled|Now we cannot {plan}|What a pity]," {b} @sighed.',
          '{b} [looked out|looked up] and [sighed|frowned]. "[It will rain all day|Look at the '
            'clouds]," {b.he} said.')
    t.maybe("[Outside|In the street], @seen [ran for shelter|got wet|stood in the rain], and the "
              "water [ran down the walls|drummed on the roofs|filled the gutters].")
    t.say('"[Wait|Never mind]," {c} @spoke. "[My home is dry|There is room at my home]!"',
          '"We can [do it|have our fun] indoors, at my place," {c} @spoke.')
    t.say("So they ran to {c.home}, where it was [warm|dry|cosy].")
    t.say("There they {instead}, and {use}. [What about the {y}?|And the {y}?] [It kept the door "
            "open|It was the first prize|They hung it up to dry|It lay on the table like a crown].")
    t.say("{c} [cooked|warmed up|served] {c.food}[, because {c.he} liked that most|], and they "
            "[had|shared] @snack with it.",
          "They ate what they had brought, and {c} told a story about @seen and a @mood @creature.")
    t.maybe("The rain [never stopped|went on until night|drummed on], but [nobody minded|nobody "
              "heard it|they did not care].")
    t.say('"[This was better than|I liked this more than] {p}," {b} said[ @how|], and {a} '
            "[agreed|nodded].",
          '"[Let us hope|I hope] that it rains [again |]next week," {a} said[ @how|], and [all '
            "three laughed|they all laughed].",
          "When {a} [carried|took] the {x} home, {a.he} was [wet to the skin|wet through] but "
            "@very @glad.")
