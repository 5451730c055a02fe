"""Word lists that templates name with "@"; an entry may hold choices, facts and other lists."""

_LISTS = {
    "number": "two; three; four; five; six; seven; eight; nine",
    "size": "big; small; new; old; fine; pretty; plain; tiny; lovely; strong; light; heavy; "
            "sturdy; clean; dusty; "
    "shiny; simple; soft; smooth; bright; handsome; charming; fancy; precious",
    "mood": "busy; noisy; sleepy; cheerful; little; old; young; hungry; proud; quiet; fat; shy; "
            "wet; "
    "happy; clever; lazy; brave; lonely; tired; muddy; friendly; angry; thirsty; gentle; merry; "
    "curious; "
    "calm; dusty",
    "herd": "ducks; sheep; rabbits; pigeons; frogs; cows; snails; swans; bees; geese; children; "
            "crabs; chickens; ponies; "
    "swallows; seagulls; puppies; kittens; lambs; toads",
    "creature": "horse; squirrel; robin; beetle; mole; lamb; calf; bat; sparrow; pony; toad; "
                "puppy; "
    "kitten; piglet; deer; spider; seagull; worm; dragonfly; turtle; rat; swallow; parrot; lizard",
    "seen": "@number @mood @herd; a @mood @creature; @number @mood @herd and a @mood @creature; "
    "a @mood @creature and @number @mood @herd",
    "spot": "by the path; behind a hedge; in the grass; near a gate; beside a puddle; at the "
            "corner; "
    "under a tree; behind a fence; next to a cart; in the shade; on the bank; in the mud",
    "colour": "red; blue; green; yellow; white; black; brown; orange; purple; grey; pink; golden",
    "when": "one morning; early one morning; late one morning; one afternoon; one day; one [spring|"
    "summer|autumn] [morning|day]; one [Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday]; "
    "on the [first|last] day of [spring|summer|the holidays]; a [week|month|year] ago",
    "over": "Pebbleford; the roofs; the river; the whole town; the fields; the harbour; the hills",
    "sunny": "@when, the sun [shone|was shining] [on|over] @over; it was a "
             "[warm|bright|clear|sunny] "
    "[morning|day] in Pebbleford[, and the sky was blue|]; @when, the sky over @over was [clear "
    "and "
    "blue|bright and clear|as blue as the sea]",
    "windy": "@when, [the|a strong|a cold|a wild] wind blew over @over; it was a "
             "[windy|wild|stormy] "
    "[morning|day] in Pebbleford[, and the leaves flew|]; @when, the wind [shook the trees|rattled "
    "the doors|pushed the clouds along] in Pebbleford",
    "cloudy": "@when, [grey|thick|low|soft] clouds hung over @over; it was a "
              "[grey|cloudy|dull|mild] "
    "[morning|day] in Pebbleford[, and there was no sun|]; @when, the sky over @over was "
    "[grey|full "
    "of clouds|as grey as slate]",
    "sunny_still": "the sun was still [shining|high|warm|bright]; the sky stayed [blue|clear]; "
                   "there "
    "was [still not a cloud|not one cloud] in the sky; the warm sun [shone on the grass|made short "
    "shadows]",
    "windy_still": "the wind was still [blowing|strong|cold|wild]; the wind [pulled|tugged] at the "
    "[doors|signs|washing|branches]; the wind [whistled|howled|sang] [round the corners|in the "
    "trees]",
    "cloudy_still": "the sky was still [grey|dull|full of clouds]; the clouds [were still "
                    "low|had not "
    "moved]; there was [still no sun|no sun at all]; the grey [clouds|sky] had not [gone|changed]",
    "glad": "glad; happy; pleased; proud; content; cheerful",
    "sad": "sad; worried; upset; unhappy; gloomy",
    "very": "very; so; really; quite",
    "went": "went; walked; hurried; ran; set off; trotted; rushed; marched; strolled",
    "looked": "looked; searched; hunted; peered about",
    "smiled": "smiled; laughed; beamed; grinned; nodded; clapped",
    "how": "softly; kindly; quietly; loudly; at once; slowly; gently; firmly; wisely; brightly; "
           "calmly; "
    "warmly; happily; politely; quickly; eagerly; after a while; with a "
    "[smile|nod|wink|laugh|cough|bow]",
    "said": "[said|answered|replied][ @how|]",
    "spoke": "said[ @how|]",
    "asked": "asked; asked @how; wanted to know",
    "sighed": "said; sighed; said [softly|quietly|sadly|slowly|with a sigh|in a low voice|with "
              "tears]",
    "oh": "oh dear; oh no; goodness; dear me",
    "yes": "of course; yes; gladly; with pleasure; certainly",
    "thanks": "thank you; many thanks; thank you so much; thank you, thank you; how kind; you "
              "are a "
    "true friend",
    "soon": "soon; before long; after a while; a little later; by and by; at last; in no time; "
            "after some time",
    "then": "then; next; after that; a little later",
    "evening": "that evening; at supper; that night; when the day was over; before bed; at sunset",
    "taste": "sweet; warm; rich; soft; fresh; good; tasty; creamy",
    "smell": "warm bread; wet grass; wood smoke; salt water; cut hay; pine trees; roses; rain; "
             "tar; sea air; "
    "burnt sugar; mint",
    "scent": "fresh paint; old books; ripe apples; hot soup; soap; leather; cinnamon; new rope; "
             "coffee; "
    "clean sheets; candles; fish",
    "sound": "a [far|low|clear] [bell|drum|trumpet]; a [man|woman|child] [singing|laughing|"
    "calling|whistling]; a cart on the stones; the church clock; running water; an axe in the "
    "wood; "
    "a door that [banged|creaked]",
    "extra": "on the way {e.he} [saw|met|passed|counted|noticed] @seen @spot; the "
             "[air|street|path|lane] "
    "smelled of @smell and @scent, and {e.he} [could hear|heard] @sound; a @mood @creature "
    "[watched|"
    "looked up|sat still|was busy] @spot, [and|while] @number @mood @herd [slept|ate|played] "
    "@spot; "
    "a @mood @creature [followed {e.him}|came along|kept {e.him} company] for a while; "
    "{d} the {d.kind} [came by|was there|stood @spot] with @pack and @snack; {d} [passed|waved], "
    "on the "
    "way to {d.near} with @snack and @pack; {d} the {d.kind} [sold|gave] {e.him} @snack and "
    "@snack; "
    "{d} [stood|sat|was] @spot [with|next to|feeding|talking to] @number @mood @herd",
    "fruit": "apples; pears; plums; nuts; rolls; buns; eggs; cherries; carrots; biscuits; "
             "pancakes; figs; lemons; "
    "berries; peaches; tomatoes",
    "dish": "bread; cheese; cake; pie; tart; melon; ham; toast; pumpkin; honey bread; plum cake; "
            "walnut cake",
    "drink": "milk; water; tea; juice; cocoa; soup",
    "snack": "a [big|small|thick|thin|fresh|tasty] slice of @dish; @number "
             "[ripe|sweet|small|fresh|big|"
    "round|fine|tasty] @fruit; a [bottle|jug|cup|pot] of [hot|cold|sweet|fresh] @drink",
    "pack": "@snack; a [warm|thick|clean|dry] @colour [blanket|scarf|towel|coat|shawl]; a "
            "[short|long|"
    "thin|strong] [rope|stick|string|ladder|pole]",
}

LISTS = {name: entries.split("; ") for name, entries in _LISTS.items()}
