"""Plots of work: building, baking and mending."""

from minillm.data.tinyworld.tale import Tale
from minillm.data.tinyworld.world import FOODS, listed

_WORKS = [
    ("raft", "floated down the river"),
    ("swing", "swung up to the leaves"),
    ("bird house", "watched two robins move in"),
    ("tree house", "looked out over all the roofs"),
    ("little cart", "rolled down the lane"),
    ("bench", "sat and talked until dark"),
    ("seesaw", "went up and down"),
    ("rabbit hutch", "gave three rabbits a home"),
    ("sledge", "slid down the grassy bank"),
    ("puppet theatre", "gave a show"),
    ("windmill", "watched it turn"),
    ("bookshelf", "filled it with books"),
    ("den", "lay hidden until supper"),
    ("wooden boat", "sailed across the pond"),
    ("market stall", "sold lemonade"),
]
_STUFF = listed("boards, crates, branches, planks, sticks, tin cans, ropes, nails, wheels, "
                "sacks, ribbons, screws, bricks, shells, rags, posts, hooks, corks")


def build(t: Tale) -> None:
    """Two build something from two finds and paint it in the favourite colour of one of them."""
    t.cast(3)
    t.places(2)
    t.facts["work"], t.facts["use"] = t.dice.pick(_WORKS)
    t.facts["m"], t.facts["n"] = t.dice.sample(_STUFF, 2)
    t.facts["who"] = t.facts[t.dice.pick("ab")]
    t.let(num="[six|seven|eight|nine|ten|eleven|twelve|twenty|thirty]")
    t.weather()
    t.fact("a")
    t.say('"[Let us|Come, let us] build a {work}," {a} said to {b}. "@yes," {b} @said.',
          "{a} and {b} [wanted|had long wished] to build a @size {work}[ of their own|].",
          "{a} had drawn a plan for a @size {work} and [showed it to|asked for the help of] {b}.")
    t.say("{p.at}, {a} [found|was given|collected] {num} [old|long|strong|good|new|fine] {m}. "
          "{b} [found|got|picked up] "
            "some {n} {q.at}.",
          "They needed {m} and {n}. {a} [got|fetched] {num} {m} from {p}, and {b} [got|brought] "
            "the {n} from {q}.")
    t.extra()
    t.say("They [carried|dragged|took] it all to {a.home} and [set to work|began|started at "
            "once]. {a} [held|measured|sorted] the {m}, {b} the {n}.")
    t.say("[But|At first] [it would not stand|it fell over|one side was too short]. {c} [came "
            'by|looked over the fence|stopped to look]. "[You need|What you need is] [more '
            '{m}|more {n}|a stronger corner]," {c.he} @spoke.',
          "[Halfway|At noon], the [{m}|{n}] [ran out|were all used up]. {c} [came by|saw it] and "
            '[gave|brought] them [some more|a few more]. "[I had these at home|Take these]," '
            "{c.he} @spoke.")
    t.maybe("{c} [helped|stayed] [for an hour|until noon|until it held] and shared @snack and "
              '@snack. "@thanks," {b} @spoke.',
            "{a} and {b} [tried again|did not give up]. [They turned it round|They began again "
              "from the ground|They tied a second knot], and this time it [held|stood firm].")
    t.say("{who} [wanted|asked for|said] {who.colour}, so they painted it {who.colour}.",
          "[Last of all|Then] they painted it {who.colour}, because that was {who}'s favourite "
            "colour.")
    t.still()
    t.say("[The next day|On Sunday|The day after], they {use}[, and {c} came too|, and ate "
            "{b.food} and @snack|].",
          "[@soon|Then], they {use}[, and {c} came too|] and [shared|had] @snack and @snack.")
    t.say('"[This is the best {work} in Pebbleford|We did it together]," {a} said[ @how|]. '
            "[Everyone|Anyone] who [passed|saw it] [liked|admired] the {who.colour} {work}.",
          "{a} [wrote|carved] three names [on|into] the {work}: {a}, {b} and {c}.",
          "[It was made of|They had needed] only {num} {m}, some {n} and good friends, [but|and "
            "yet] it was [perfect|just right].")


def bake(t: Tale) -> None:
    """A favourite food for a birthday; one ingredient is missing and must be fetched."""
    _, b, _ = t.cast(3)
    t.things(1)
    t.places(1)
    t.facts["one"], t.facts["two"] = t.dice.shuffle(FOODS[b.food][:2])
    t.let(age="[birthday|name day|big day]", was='were' if t.facts['two'].endswith('s') else 'was')
    t.weather()
    t.say("It was {b}'s {age}[, and {a} wanted to make something nice|, and {a} had been up "
            "since six|].",
          "{a} had no present yet for {b}'s {age}[, and it was that very day|].")
    t.fact("a")
    t.say('"What does {b} like best?" {a} [wondered|thought]. [The answer was easy|That was '
            "easy]: {b.food}!",
          "{b} liked {b.food} better than anything, so {a} [decided|planned] to make {b.food}.")
    t.say("[In the kitchen|On the shelf], {a} had plenty of {one}, [but no {two} at all|but the "
            "{two} {was} gone].",
          "{a} [got out|found] the {one}, a @size bowl and a @colour spoon. But there "
            "[{was}|seemed to be] no {two} [anywhere|left].")
    t.extra()
    t.say('{a} @went to {p} and met {c}, who had a @size {x} and @pack. "[Do you have any|Could '
            'you spare some] {two}?" {a} @asked.')
    t.say('"[I do|Just a minute]," {c} @said, and [gave|brought] {a.him} the {two}. "[But keep a '
            'piece for me|But I would like a bit too]."',
          '"[For {b}? Of course|For {b}? Gladly]," {c} @said, and gave {a.him} [enough {two} for '
            "@number people|more {two} than {a.he} needed].")
    t.say("[Back home|At home], {a} [mixed|stirred] the {one} and the {two}[, tasted it @number "
            "times|, sang a song|] and waited.",
          "{a} [hurried|ran] home. The {one} and the {two} went into the [bowl|pot][, with a "
            "little salt|, with a lot of love|].")
    t.say("@soon, the house smelled of {b.food} and @smell.",
          "@soon, the {b.food} looked @taste and @taste.")
    t.say("{a} [carried|took] it to {b.home} on a {b.colour} plate, for {b.colour} was {b}'s "
            "favourite colour.",
          "{a} put a {b.colour} cloth over it, because {b} loved {b.colour}, and [took|carried] "
            "it to {b.home}.")
    t.maybe('"{b.food}!" [cried|called] {b}. "[How did you know|My favourite]!" {b} '
              "[ate|tried] a bit. It was @taste and @taste.",
            '{b} [opened the door|came out] and [sniffed|looked]. "Do I smell {b.food}?" {b.he} '
              '@asked. "@thanks!"')
    t.say("{c} came [too|as well] with @snack and [got|was given] the [biggest|first|second] "
            "[helping|share], [because|for] the {two} came from {c.him}.",
          "[There was enough for|They shared it with] {c}, who had given the {two}, and not a "
            "[bite|crumb] was left.",
          '"Without {c}, there would be no {b.food}," {a} @spoke, so they [asked {c} to come|kept '
            "some for {c}|sent {c} some and @snack].")


_BROKEN = [
    ("kite", "tail", "needle"),
    ("cart", "wheel", "hammer"),
    ("chair", "leg", "saw"),
    ("clock", "hand", "screwdriver"),
    ("drum", "skin", "needle"),
    ("lantern", "handle", "file"),
    ("toy horse", "ear", "glue pot"),
    ("basket", "handle", "knife"),
    ("umbrella", "rib", "file"),
    ("doll", "arm", "needle"),
    ("puppet", "string", "needle"),
    ("box", "lid", "hammer"),
    ("wagon", "axle", "hammer"),
    ("music stand", "foot", "screwdriver"),
    ("toy train", "wheel", "glue pot"),
    ("bag", "strap", "needle"),
    ("table", "leg", "saw"),
    ("broom", "stick", "knife"),
    ("bird cage", "door", "file"),
]


def mend(t: Tale) -> None:
    """The broken thing gets whole with a borrowed tool, and the tool goes back."""
    t.cast(3)
    t.places(1)
    t.facts["x_"], t.facts["part"], t.facts["tool"] = t.dice.pick(_BROKEN)
    t.let(x="@colour {x_}")
    t.weather()
    t.fact("b")
    t.say("{b} had a @size {x}[ that {b.he} used every day| that was older than {b.he} was|, a "
            "present from {c}|].",
          "{b} was @very proud of {b.his} @size {x}[, which had cost @number coins|].")
    t.say("[But one day|Then one day|But that day], {b.he} [dropped it|fell over it|sat on it] "
            "{p.at}, and the {part} [broke|came off].",
          "[But|Then] a @mood @creature and @number @herd [ran into it|knocked it over] {p.at}, "
            "and the {part} [broke|broke in two|came off].")
    t.maybe('"[It is ruined|Now it is good for nothing|Nobody can mend this]," {b} '
              "[sobbed|sighed|said].",
            "{b} sat down {p.at} and [cried|was @very @sad].")
    t.say('[Just then|@soon], {a} [came by|came along] with @pack and @pack. "[What has '
            'happened|Why are you @sad]?" {a.he} @asked. {b} showed {a.him} the {part}.')
    t.say('"[I can mend that|We can fix this|That is easy]," {a} @spoke, "but I [need a|have no] '
            '{tool}."')
    t.say("{c} had a {tool}, so they @went to {c.home}.")
    t.extra("b")
    t.say('"You may [borrow|take] my {tool}," {c} @said, "but please bring it back [today|before '
            'dark|before supper]."',
          '"[Take it|Here it is]," {c} @said. "[Only|But] I need my {tool} again tomorrow."')
    t.say("{a} [worked|was busy] with the {tool} [for an hour|until noon|for a long time], and "
            "{b} held the {part} [still|in place|tight].",
          "{b} held the {x_}, and {a} used the {tool} [slowly and carefully|@number times|with "
            "great care].")
    t.still()
    t.say("At last the {part} [was as good as new|held again|was stronger than before][, and the "
            "{x} was whole|].",
          '"[Done|There]!" said {a}. The {x} [had its {part} again|looked like new].')
    t.say("Then they [took|carried] the {tool} back to {c}[, as they had been asked|, together "
            "with @snack|].",
          "[First of all|Then] {b} [took|brought] the {tool} back to {c}, with @snack and @snack "
            "as a thank-you.")
    t.say('"@thanks," {b} said to {a}, and [cooked|made] {a.him} {a.serving}[, because {a} loved '
            "{a.food}|].",
          "{b} painted a small {a.colour} [star|dot|heart] on the {part}, because that was {a}'s "
            "favourite colour.",
          "{b} [used|showed] the {x} [the same day|that evening], and [told everyone|said] who "
            "had mended it: {a}.")
