"""Plots of house and garden: a harvest to share, and a neighbour in need."""

from minillm.data.tinyworld.tale import Tale
from minillm.data.tinyworld.world import listed

_PESTS = [
    ("snails ate the leaves", "put a ring of sand round each bed"),
    ("rabbits ate the leaves", "built a low fence"),
    ("crows pulled up the shoots", "put up a man of straw"),
    ("the sun dried the ground", "carried @number buckets of water a day"),
    ("weeds choked the plants", "pulled up every weed"),
    ("beetles ate holes in the leaves", "let @number hens into the garden"),
    ("the wind broke the stems", "tied each stem to a stick"),
    ("a @mood sheep trampled the rows", "put up a gate with a bell"),
    ("a cold night hurt the leaves", "covered the beds with straw"),
    ("moles dug up the roots", "set @number windmills on the beds"),
]
_NUMBERS = listed("none, one, two, three, four, five, six, seven, eight, nine, ten, eleven, "
                  "twelve, thirteen, fourteen, fifteen")


def garden(t: Tale) -> None:
    """Seeds, a pest, a remedy and a harvest that is counted and shared."""
    t.cast(3)
    t.places(1)
    pest, cure = t.dice.pick(_PESTS)
    t.let(pest=pest,
          cure=cure,
          tool="@colour [spade|rake|watering can|bucket|hoe|basket]",
          crop=
              "[pumpkins|beans|carrots|peas|tomatoes|sunflowers|roses|cabbages|onions|tulips|"
              "melons|potatoes|berries|daisies|radishes|lettuces]")
    total = t.dice.pick(range(7, 16))
    given = t.dice.pick(range(2, total - 3))
    t.facts |= {"total": _NUMBERS[total], "given": _NUMBERS[given], "kept": _NUMBERS[total - given]}
    t.say("In [the spring|March|April|May], {a} [wanted|decided] to grow {crop} "
            "[beside|behind|next to] {a.own}.",
          "{a} had [a small|an empty] garden [beside|behind] {a.own}, and [that year|that "
            "spring] {a.he} wanted to grow {crop}.")
    t.fact("b")
    t.say("{b} [gave|sold] {a.him} a bag of seeds, and {c} lent {a.him} a @size {tool} that had "
            "stood {p.at}.",
          "{a.he} [got|bought] the seeds {p.at}, and {c} lent {a.him} a @size {tool} for the work.")
    t.say("{a} dug for @number days, made @number rows and [sowed|planted] the seeds.",
          "With the {tool}, {a} made @number [long|straight] rows, and @number @mood @herd "
            "watched {a.him} [dig|work].")
    t.say("For @number [days|weeks], [nothing happened|there was nothing to see], then small "
            "green [tips|leaves|shoots] came up.",
          "{a} watered the rows [every day|each morning|each evening], and @soon the first "
            "[green|small] [tips|leaves] came up.")
    t.say('[But|Then] {pest}. "[All my work|My poor {crop}]!" {a} [cried|said].',
          "[Then one day|One day], {pest}, and {a} was @very @sad.")
    t.say('{b} [came to see|looked over the fence]. "[Do not give up|It is not too late]," '
            '{b.he} @spoke. "[I know what to do|There is a way|I will help you]."')
    t.say("So {a} and {b} {cure}, [and|while] {c} brought them @snack and @snack.",
          "So {a} and {b} {cure}[, singing as they worked|, although it was hard work|].")
    t.say("[It worked|That helped]! The {crop} grew [bigger|finer] [every week|day by day][, and "
            "@seen came to look|].")
    t.say("In [August|September|the autumn], {a} counted [them|the {crop}]: there were {total}[ "
            "in all|].",
          "[At last|Then] the {crop} were [ready|at their best], {total} of them[, each one "
            "perfect|].")
    t.say("{a} gave {given} of them to {b}[, who had saved the garden|] and kept {kept}.",
          '"{given} of them are for you," {a} said to {b}, and still {kept} were left[ for '
            "{a.him}|].")
    t.say("[Then|Last of all] {a} [cleaned|washed] the {tool} and brought it back to {c} [with a "
            "big thank-you|together with @snack and @snack].",
          "{c} got {c.his} {tool} back[, clean and shining|]. {c.he} stayed for [supper|lunch] "
            "and had {c.food}[ and @snack|].")
    t.maybe('"[Next year|Next spring] we will [grow|plant] [even more|twice as many]," {a} said, '
              "and {b} [agreed|nodded|shook hands on it].",
            "[@evening|Then], they sat in the garden and ate {b.food}[, and the air smelled of "
              "@smell|, until it was dark].")


_TROUBLES = [
    ("the roof leaks", "patched the roof", "ladder"),
    ("the cellar is full of water", "carried out the water", "bucket"),
    ("my hens have run away", "caught all the hens", "net"),
    ("the floor is covered in mud", "cleaned the floor", "broom"),
    ("the chimney is blocked", "swept the chimney", "brush"),
    ("the hay must come in before night", "brought in the hay", "cart"),
    ("a tree fell on my fence", "sawed up the tree", "saw"),
    ("the door will not open", "took off the door", "hammer"),
    ("a cow is stuck in the mud", "pulled out the cow", "rope"),
    ("the well is dry", "carried water from the river", "barrel"),
    ("my cart has tipped over", "set up the cart again", "pole"),
    ("the wind broke my window", "put in new glass", "glue pot"),
    ("the path is full of stones", "cleared the path", "wheelbarrow"),
    ("my kite hangs in the tree", "got the kite down", "stick"),
]


def help_neighbour(t: Tale) -> None:
    """A plan is given up for a neighbour's trouble, and the neighbour does not forget it."""
    t.cast(3)
    t.things(1)
    t.places(2)
    t.facts["trouble"], t.facts["work"], t.facts["y_"] = t.dice.pick(_TROUBLES)
    t.let(y="@colour {y_}")
    t.weather()
    t.fact("a")
    t.say("That day {a} wanted to go to {p} to {p.errand}, and {a.his} @size {x} [was ready|was "
            "packed].",
          "{a} had [packed|taken] a @size {x} and @pack and was on the way to {p} to {p.errand}.")
    t.say("[But|Then] {a.he} heard [a cry|someone call|a loud sigh]. It was {b}, the {b.kind} "
            "from {b.near}.",
          "Near {b.near}, {a.he} [met|saw] {b}, who looked @very @sad.")
    t.say('"@oh, {trouble}," {b} @sighed, "and [I am all alone|there is no one to help|I cannot '
            'do it alone]."')
    t.say('"[I will help you|Let me help]," {a} @said, and [thought no more of {p}|forgot about '
            "{p}].",
          '"[Then {p} can wait|I can go to {p} tomorrow]," {a} @said.')
    t.say("They needed a {y_}, so {a} @went to {q}, because {c} was there with a @size {y}.",
          '"[We need|If only we had] a {y_}," said {b}. {a} [ran|went] to {c}, who was {q.at} '
            "and had a @size {y}.")
    t.extra()
    t.say('"[Take it|Of course]," {c} @said. "[And I will come along|I am coming too|Three can '
            'do more than two]."')
    t.say("[In @number hours|Before noon|By the evening], the three of them {work}, and the {y} "
            "was [a great help|very useful].",
          "They {work}, [and it was hard|and it took @number hours|and nobody complained]. The "
            "{y} [was a great help|helped a lot].")
    t.maybe("[Once|Twice], they [stopped|rested] to [look at @seen|share @snack|share @snack and "
              "@snack].")
    t.maybe('"@thanks," {b} @spoke. "[What can I give you|How can I thank you]?" "[Nothing|Not a '
              'thing]," {a} @said.')
    t.say("But {b} [did not forget|remembered it]. The next day {b.he} [was at the door|came] "
            "with {a.serving} and @snack.",
          "[The next day|On Sunday], {b} [went|came] with {a} to {p} to {p.errand}[, and it was "
            "twice the fun|, and {c} came too].")
    t.say("[And|Then] {c} got {c.his} {y} back, and with it @snack.",
          "And [whenever|if] {a} [needed help|was in trouble], {b} [came at once|was the first "
            "to come].",
          "[Good neighbours|Friends], {a} [thought|said], are [worth more than|better than] [a "
            "day off|gold|a trip to {p}].")
