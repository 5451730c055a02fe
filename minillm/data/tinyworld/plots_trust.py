"""Plots of give and take: a chain of trades, a secret gift, a promise kept."""

from minillm.data.tinyworld.tale import Tale


def trade(t: Tale) -> None:
    """x goes to b, y to c, and z, the wish, comes to a: three things change hands."""
    t.cast(3)
    t.things(3)
    t.places(2)
    t.weather()
    t.fact("a")
    t.say("{a} had a @size {x}, but [what {a.he} really wanted was|{a.he} wished for|all {a.he} "
            "wanted was] a {z}.",
          "More than anything, {a} wanted a @size {z}. [But|Yet] all {a.he} had was a {x}.")
    t.say("The only {z} in [Pebbleford|the town] belonged to {c}.",
          "{c} [had|owned] [just such a|a very fine] {z_}[, the best in Pebbleford|].")
    t.say('{a.he} found {c} {p.at}, next to @seen. "[Will you swap|Would you trade] your {z_} '
            'for my {x_}?" {a.he} @asked.')
    t.say('"I [have no use for|do not need] a {x_}," {c} @said. "But [bring me|I would give it '
            'for] a {y}."',
          '"[Sorry|No, thank you]," {c} @said. "I [need|want] a {y}."')
    t.say("{a} [walked about|asked around|went from door to door] for [an hour|a while|some "
            "time] and met only @seen @spot.",
          "So {a} @went to [look|ask] [in every street|everywhere] and [even |]asked @seen @spot.")
    t.say("[At last|Then] {a.he} met {b} {q.at}. {b} was carrying a @size {y} and @pack!",
          "{q.at}, {b} was @sad. {b.he} had a @size {y}, but did not want it.")
    t.say('"Would you trade that {y_} for my {x}?" {a} @asked.',
          '"[How lucky|Just in time]!" said {a}. "I will give you my {x} for your {y_}."')
    t.say('"[A {x_} is just what I need|I have always wanted a {x_}|Done]," {b} @said[, and they '
            "shook on it|].",
          '{b} [looked at the {x} from all sides|tried the {x_}] and @smiled. "@yes," {b.he} '
            "@said.")
    t.say("{a} @went back to {p}, and {c} [kept the bargain|kept {c.his} word].",
          "@soon, {a} stood {p.at} again with the {y}, and {c} [could hardly believe it|@smiled].")
    t.say("So [in the end|by the evening], {b} had the {x}, {c} had the {y}, and {a} [took "
            "home|had] the {z}.",
          "Now the {x} was {b}'s, the {y} was {c}'s, and the {z} was [in {a}'s arms|{a}'s at "
            "last].")
    t.maybe("[All three were|Each of them was] @very @glad[, and nobody had paid a penny|].",
            "{a} kept the {z_} [safe |]in {a.own}[, next to @pack|, beside @pack and @pack|].",
            "[@evening, {a}|{a}] [put|set] the {z_} next to {a.his} {a.treasure}[ and looked at "
              "both for a long time|].")


def secret_gift(t: Tale) -> None:
    """A gift in the friend's colour is hidden; the note gives away who it is from."""
    t.cast(3)
    t.things(1)
    t.places(2)
    t.let(gift="{b.colour} {x_}",
          clue="[someone who loves {a.food}|the one who {a.does}|a friend who fears {a.fear}|the "
            "owner of a {a.treasure}|a neighbour from {a.near}]")
    t.weather()
    t.fact("b")
    t.say("{a} [saw|heard|noticed] that {b} was @very @sad, [for {b.his} {x_} had fallen into "
            "the river|because {b.his} @size {x_} was worn out|since {b.he} had lost "
            "{b.his} @size {x_}].",
          "{b}'s {x_} was [old and worn|broken], and {b.he} had no [money|penny] for [another|a "
            "new one].")
    t.maybe('"[I will|Let me] [get|find] {b} a [new|fine new|better] {x_}," {a} [told '
              "{c}|thought].")
    t.say("{a} [worked hard|saved every penny|sold @snack and @snack|sold @pack] [for @number "
            "[days|weeks]|day after day] [and then bought|until {a.he} could buy] a @size {x_} "
            "{p.at}.",
          "[For @number [days|nights|evenings]|All week], {a} [worked|was busy] [behind closed "
            "doors|in secret] {p.at}, and [then|at last] a @size {x_} was [ready|done].")
    t.say("{b} [liked {b.colour} best|loved {b.colour}], so {a} [made|coloured] it {b.colour}.")
    t.say("[Early the next day|While {b} was asleep|When no one was looking], {a} hid the {gift} "
            "{q.spot} {q.at}[, next to @pack|].")
    t.say("{a.he} [put|left|pushed] a note under {b}'s door. \"[Look|Go and look] {q.spot} "
            '{q.at}," it said. "From {clue}."',
          '{c} [brought|took] {b} a note. It said: "Something waits {q.spot} {q.at}. It is from '
            '{clue}."')
    t.say("{b} [read it twice|rubbed both eyes|could hardly believe it] and @went to {q}.")
    t.extra("b")
    t.say("[There, |And there, ]{q.spot}, was a [brand new|beautiful|fine] {gift}!",
          "{b} looked {q.spot} and [pulled out|found] a {gift}.")
    t.say('"From {clue}? [I know|Of course]! It is {a}!" {b} [cried|laughed].',
          '"From {clue}," {b} read [aloud|again]. "[That can only be|Who else than] {a}!"')
    t.say('{b} @went to {a.home} with @pack and @snack. "@thanks," {b.he} @spoke.')
    t.say("[From then on|After that day], {b} took the {gift} [everywhere|wherever {b.he} went].",
          '"[How did you know|Who told you]?" {a} @asked. "[You wrote it yourself|The note told '
            'me]," said {b}, and they both laughed.',
          "[@evening, {b}|{b}] [cooked|made] {a.food} for {a}, [which {a} liked best|and not a "
            "bite was left].")


def promise(t: Tale) -> None:
    """Something lent must be back at a certain hour, and on the way there is a temptation."""
    t.cast(3)
    t.things(1)
    t.places(3)
    t.let(hour="[three|four|five|six|seven]",
          use="[a birthday game|the school play|a long walk|a new picture|a visit|the fair|a "
            "surprise|a costume]",
          treat="[a dance|a puppet show|a game of cards|a magic show|a quiz|a singing contest|a "
            "feast|a story hour]")
    t.weather()
    t.fact("a")
    t.say("{a} needed a {x_} for {use}, and {b} had a @size {x}.",
          "For {use}, {a} [wanted to borrow|had to have] a {x_}. [Luckily, |]{b} [owned|had] a "
            "@size {x}.")
    t.say('"[You may have it|Take it|I will lend it to you]," {b} @spoke, "but [bring it|I must '
            "have it] back by {hour} o'clock. [I need it|I shall need it] {p.at}.\"",
          "\"[Please be back|You must be back] [by|before] {hour} o'clock,\" {b} @spoke. "
            '"[Then|After that] I need it {p.at}."')
    t.say('"I promise," {a} @said, and @went to {q} with the {x}.')
    t.extra()
    t.say("[On the way back|On the way], near the {r.feature}, {a} [met|ran into] {c}, who [had "
            "@pack and @snack|was carrying @pack].")
    t.say('"[Come with me|Come along|Stay here]!" {c} @said. "There is {treat} {r.at}, with '
            '@snack and @snack!"')
    t.say("{a} [wanted to go|would have loved to go] very much. [Then|But then] the clock struck "
            "[the half hour|a quarter to {hour}].",
          "{a} [forgot everything|wanted to go], but then {a.he} felt the {x_} under {a.his} arm.")
    t.say('"[I cannot|I am sorry]," {a} @sighed. "I promised {b} [to be back|to bring this {x_} '
            'back] by {hour}."')
    t.say("{a} ran [past @seen|past @seen @spot|up the hill|without a stop|all the way]. The "
            "clock [began to strike|was striking] {hour} when {a.he} [reached|came to] {b.home}.")
    t.say('"[Here is your {x_}|Here I am]," {a} [panted|called]. "[Just in time|I knew you would '
            'come]," {b} @said.',
          '"[You kept your word|You are right on time]," {b} @spoke and took the {x_}.')
    t.say('"[Now|Then] come with me to {p}," said {b}, "and after that we [will|can] both go to '
            '{r}."',
          "{a} had kept the promise, and {b} lent {a.him} the {x_} again [the next day|whenever "
            "{a.he} asked].",
          "{a} missed {treat}, but [{c} saved {a.him} @snack and @snack|{b} gave {a.him} "
            "{a.serving}|{b} thanked {a.him} with @snack].")
