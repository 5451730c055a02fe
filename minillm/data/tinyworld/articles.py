"""Small-town news with highlights that say the main facts again in other words."""

import hashlib

from minillm.data.tinyworld.dice import Dice
from minillm.data.tinyworld.phrases import write
from minillm.data.tinyworld.world import PEOPLE, PLACES, THINGS

# An event: facts to throw for, the lead, what happened, what came of it, and the highlights.
_EVENTS = [
    {   # a theft that was none
        "facts": {"thief": "[crow|squirrel|magpie|jackdaw]", "n": "@number", "gold": "@colour {x}"},
        "lead": "[There was great alarm {p.at} on {day}|All Pebbleford was talking on {day}], "
                "[when|after] {a} the {a.kind} [found|saw] that a {gold} was [gone|missing].",
        "body": ["{a} had [left|put] it {p.spot} and [went|had gone] to {q} to {q.errand}. [When "
                 "{a.he} came back|An hour later], the place was empty.",
                 "[Several people|@number neighbours] [at first |]thought of a thief, and {b} "
                 "the {b.kind} [offered|began] to question everyone who had been near {p}."],
        "quote": '"I have had that {x} for {n} years, and I would not sell it for '
                 '[gold|anything]," {a}',
        "late": ["[But the answer was a different one|It all ended well, however]. [Towards "
                 "evening|Before dark], {c} the {c.kind} [climbed|looked] up to a nest {r.at}, "
                 "and there lay the {x}: a young {thief} had [carried|dragged] it off as a toy.",
                 "{a} [thanked|rewarded] {c} with {c.serving}, which {c} [is said to like|likes] "
                 "above all."],
        "highlights": ["{a}'s {gold} [vanished|disappeared] {p.at} on {day}.",
                       "The culprit [was|turned out to be] a young {thief}, not a thief.",
                       "{c} discovered the {x} {r.at} and [got|received] {c.food} as a reward."],
    },
    {   # a contest
        "facts": {"game": "[cake contest|singing contest|boat race|kite contest|pumpkin "
                          "contest|painting contest]", "n": "@number",
                  "prize": "[silver|golden|glass|copper] [cup|bell|spoon|plate]"},
        "lead": "[The great|The yearly|Pebbleford's] {game} was held {p.at} on {day}, and [half "
                "the town|a large crowd] came to watch.",
        "body": ["{b} the {b.kind}, who [had won the last two times|was the clear favourite], "
                 "[started|began] well and was ahead [at noon|for most of the day].",
                 "[Only|Just] {n} [people|neighbours] had [dared|signed up] to [take part|enter] "
                 "this year, [two fewer|one more] than the year before.",
                 "The rules were read out by {c} the {c.kind}, who [was|acted as] judge."],
        "quote": '"I have never seen so many [good|strong] entries {p.at}," {c}',
        "late": ["[In the end|At the very last moment], however, {a} the {a.kind} [came from "
                 "behind|did even better] and [won|took home] the {prize}.",
                 "{a}, who {a.does} and had never [won|entered] before, [said|told us] that the "
                 "{prize} would stand next to {a.his} {a.treasure}."],
        "highlights": ["{a} [is the surprise winner|has surprisingly won first place] in the "
                       "{game}.",
                       "{b}, the champion so far, was in the lead for hours [but lost|but came "
                       "second].",
                       "The new champion [plans to keep|will keep] the {prize} beside a "
                       "{a.treasure}."],
    },
    {   # storm damage
        "facts": {"n": "@number", "days": "@number",
                  "damage": "the [roof|door|fence|chimney|wall] of a hut"},
        "lead": "A [heavy|violent|sudden] storm [hit|struck] Pebbleford in the night to {day} "
                "and [tore off|badly damaged] {damage} {p.at}.",
        "body": ["{a} the {a.kind}, who lives in {a.home}, [was the first to see it|heard the "
                 "noise and ran out in a night shirt].",
                 "[Rain|Water] came in [for hours|until morning], and @number "
                 "[lambs|hens|rabbits|sheep|puppies] had to be [led|carried] to safety.",
                 "{b} the {b.kind} [called|asked] for help, and @number [people|neighbours] "
                 "brought ladders, ropes and a {x}."],
        "quote": '"[We have seen worse|It could have been worse], but I did not [sleep|close an '
                 'eye] all night," {a}',
        "late": ["[Thanks to|With the help of] all these hands, the repairs took {days} days "
                 "[instead of|rather than] the month that had been feared.",
                 "Nobody was hurt. The bill of {n} hundred coins was paid by {c} the {c.kind}, "
                 "who had [saved|put aside] the money for a {boat} of {c.his} own."],
        "highlights": ["Bad weather [wrecked|broke] {damage} {p.at}, but [no one was "
                       "injured|everybody is safe].",
                       "Volunteers [finished|completed] the work within {days} days.",
                       "{c} covered the costs of {n} hundred coins from private savings."],
    },
    {   # something new is opened
        "facts": {"new": "[bench|playground|footbridge|fountain|clock|reading room|small "
                         "museum|bandstand]", "n": "@number",
                  "months": "@number"},
        "lead": "[After|Following] {months} months of work, a new {new} was opened {p.at} on "
                "{day}.",
        "body": ["The {new} was [planned|designed] by {b} the {b.kind} and [built|put up] with "
                 "the help of @number children from the school.",
                 "[It is painted|The builders painted it] {b.colour}, [because that is {b}'s "
                 "favourite colour|a colour that {b} loves].",
                 "A [brass band|choir|small band] played [in the wind|all morning], and {c} the "
                 "{c.kind} [gave out|served] {c.food} to everyone."],
        "quote": '"We have waited for this for {n} years," {c}',
        "late": ["[Not everything went to plan|There was one mishap]: the {x} that was meant to "
                 "cut the ribbon [was lost|could not be found], so {a} the {a.kind} bit through "
                 "it [with strong teeth|to loud cheers].",
                 "The {new} will be [open|free] for all, but only [until dark|by day], because "
                 "{d} the {d.kind}, who will look after it, is afraid of {d.fear}."],
        "highlights": ["Pebbleford has a new {new}, a work of {b}.",
                       "{a} had to open the ribbon [by biting it|with the teeth] because a {x} "
                       "[had gone missing|was missing].",
                       "{d} [will be|becomes] its keeper, and it [closes|shuts] at night."],
    },
    {   # a rescue
        "outdoors": True,
        "facts": {"pet": "@mood [lamb|puppy|kitten|calf|piglet|pony]", "n": "@number", "trap":
                                 "[an old well|a deep ditch|a hollow tree|a drain|a muddy hole]"},
        "lead": "[A rescue {p.at} kept Pebbleford busy on {day}|Loud cries {p.at} woke the "
                "neighbours on {day}]: a {pet} had fallen into {trap}.",
        "body": ["{b} the {b.kind} was on the way to {p.errand} and heard it first. {b.he} "
                 "[ran|hurried] to {q} to fetch help.",
                 "@number [men and women|helpers] came with a {x} and [tried in vain|did their "
                 "best], but the opening was [too narrow|too deep] for them.",
                 "Meanwhile {c} the {c.kind} [kept the animal calm|calmed the animal] with "
                 "[songs|soft words|bits of bread]."],
        "quote": '"It looked at me with such big eyes that I could not go home," {b}',
        "late": ["After {n} hours it was {a} the {a.kind} who [had the right idea|found the "
                 "answer]: {a.he} tied {a.his} own {thing} to a rope and [pulled|drew] the "
                 "animal out [unhurt|safe and sound].",
                 "The owner could not be found, so {d} the {d.kind} has taken it in. It now "
                 "lives in {d.home}."],
        "highlights": ["A trapped animal was [freed|saved] {p.at} thanks to {a}'s idea with a "
                       "{thing} and a rope.",
                       "[Earlier attempts|The first attempts] failed because [the gap was too "
                       "small or deep|helpers could not reach it].",
                       "It has [found a new home|been given a home] with {d}."],
    },
    {   # a record harvest
        "facts": {"crop": "[pumpkin|turnip|cabbage|melon|carrot|potato]", "n": "@number", "kilos":
                            "[thirty|forty|fifty|sixty|seventy|eighty]"},
        "lead": "[A giant {crop}|A {crop} of unusual size] was [shown|put on the scales] {p.at} "
                "on {day}.",
        "body": ["{a} the {a.kind} had [grown|raised] it [beside|behind] {a.own} and had [told "
                 "nobody|kept it a secret] for {n} months.",
                 "It took @number [strong neighbours|people] and a cart to bring it to {p}, past "
                 "@seen.",
                 "{b} the {b.kind} [weighed|measured] it [twice|three times] because the [first "
                 "number|result] [seemed|sounded] too high."],
        "quote": '"I [only gave it|gave it nothing but] water and a little music," {a}',
        "late": ["[The scales stopped at|In the end it weighed] {kilos} kilos, [which is|and "
                 "that is] more than any {crop} in Pebbleford before.",
                 "{a} does not want to sell it. {a.he} will give it to {q}, where {c} the "
                 "{c.kind} [is going to|will] cook it for everyone on Sunday."],
        "highlights": ["{a} [has set a town record with|holds the town record for] a {crop} of "
                       "{kilos} kilos.",
                       "The vegetable was grown [in secret|secretly], and it had to be weighed "
                       "more than once.",
                       "It is [not for sale|a gift]: {c} will turn it into a meal for the whole "
                       "town {q.at}."],
    },
    {   # a lost letter arrives
        "facts": {"n": "[ten|twelve|twenty|thirty|forty]", "found":
                         "[a crack in the wall|an old boot|a locked drawer|a mail bag|a clock "
                         "case]",
                  "m": "@number"},
        "lead": "A letter that was [posted|sent] {n} years ago [reached|came to] {a} the "
                "{a.kind} [at last|on {day}].",
        "body": ["It had [lain|been] in {found} {p.at}[ all this time|], [where|until] {b} the "
                 "{b.kind} came upon it while looking for a {x}.",
                 "The stamp showed a {a.colour} {bird}, and the ink [could still be read|was "
                 "hardly faded].",
                 "@number people [gathered|stood] outside {a.home} when {a} opened it on {day}."],
        "quote": '"I [thought|was sure] that I had been forgotten," {a}',
        "late": ["The letter was from {c} the {c.kind}, who had [asked|invited] {a} to {q} to "
                 "share {c.food}.",
                 "{a} [did not wait|lost no time]. The two met {q.at} that [same evening|very "
                 "evening] and talked for {m} hours, {n} years late."],
        "highlights": ["Mail for {a} turned up {p.at} after {n} years.",
                       "{b} discovered it by chance [during a search|while searching for "
                       "something else].",
                       "It was an invitation from {c}, and [the meeting has now taken place|they "
                       "have now met] {q.at}."],
    },
]  # fmt: skip

_COLOUR = [
    "@seen [watched|waited] @spot.", "The air smelled of @smell and @scent.",
            "[From far away came|One could hear] @sound.",
    "The wind [turned twice|was mild], and [at noon|towards evening] the clouds [parted|hung "
    "low] over @over.",
    "{e} the {e.kind} [sold @snack|stood @spot with @snack].",
                       "A @mood @creature [ran past|came closer and closer].",
    "[Somebody|A child] had brought @snack and @snack.",
]  # fmt: skip


def _facts(dice: Dice, event: dict) -> dict:
    p = dice.pick([place for place in PLACES if place.outdoors or "outdoors" not in event])
    q, r = dice.sample([place for place in PLACES if place != p], 2)
    facts = {"p": p, "q": q, "r": r} | dict(zip("abcde", dice.sample(PEOPLE, 5), strict=True))
    facts |= {"x": dice.pick(THINGS), "bird": dice.pick(["swan", "goose", "robin", "owl"]),
              "boat": dice.pick(["boat", "piano", "pony", "house"]), "thing": dice.pick(["scarf",
                  "belt", "coat", "blanket", "net"]),
              "day": dice.pick(["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday",
                               "Sunday"])}
    for key, template in event["facts"].items():
        facts[key] = write(template, dice, **facts).lower()
    return facts


def _article(dice: Dice) -> dict:
    event = dice.pick(_EVENTS)
    facts = _facts(dice, event)
    body = [write(line, dice, **facts) for line in event["body"]]
    body.append(write(event["quote"] + " [said|told us|told this paper].", dice, **facts))
    for line in dice.sample(_COLOUR, dice.pick([2, 3])):
        body.insert(dice.pick(range(len(body) + 1)), write(line, dice, **facts))
    late = [write(line, dice, **facts) for line in event["late"]]
    article = " ".join([write(event["lead"], dice, **facts), *body, *late])
    chosen = event["highlights"] if dice.chance(0.7) else [event["highlights"][0], event[
        "highlights"][2]]
    highlights = "\n".join(write(line, dice, **facts) for line in chosen)
    identity = hashlib.sha1(article.encode()).hexdigest()
    return {"article": article, "highlights": highlights, "id": identity}


def articles(n: int, seed: int = 0) -> list[dict]:
    """n distinct rows: article (90 to 200 words), highlights (2 or 3 lines), id (SHA-1).

    At least one highlight tells what comes late in the article, past colour that does not matter.
    """
    dice, rows = Dice(f"articles {seed}"), {}
    while len(rows) < n:
        row = _article(dice)
        if 90 <= len(row["article"].split()) <= 200:
            rows[row["id"]] = row
    return list(rows.values())
