"""Word lists that templates name with "@"; an entry may hold choices and names of its own."""

_LISTS = {
    "number": "two; three; four; five; six",
    "mood": "busy; noisy; sleepy; cheerful; little; old; young; hungry; proud; quiet; fat; shy",
    "herd": "ducks; sheep; rabbits; pigeons; frogs; cows; horses; snails; swans; squirrels; robins",
    "creature": "duck; sheep; rabbit; pigeon; frog; cow; horse; snail; swan; squirrel; robin; beetle",
    "seen": "@number @mood @herd; a @mood @creature; a @mood @creature and a @mood @creature; "
    "@number @herd and a @mood @creature",
    "where_seen": "on a wall; by the path; under a hedge; in the grass; near a gate; beside a puddle; "
    "at the corner; under a tree; behind a fence; next to a cart",
    "colour": "red; blue; green; yellow; white; black; brown; orange; purple; grey; pink; golden",
    "when": "one morning; early one morning; late one morning; one afternoon; one day; "
    "one Monday; one Tuesday; one Thursday; one Friday; one Saturday; last week; in the spring; "
    "in the autumn; on the first day of the holidays; on a quiet day",
    "sunny": "@when, the sun [shone|was shining] [on|over] [Pebbleford|the roofs|the river|the whole town]; "
    "it was a [warm|bright|clear|sunny] [morning|day] in Pebbleford[, and the sky was blue|]; "
    "@when, the sky over [Pebbleford|the town|the fields] was [clear and blue|bright and clear]",
    "windy": "@when, [the|a strong|a cold|a wild] wind blew [through|over] [Pebbleford|the streets|the "
    "roofs|the fields]; it was a [windy|wild|stormy] [morning|day] in Pebbleford[, and the leaves flew|]; "
    "@when, the wind [shook the trees|rattled the doors|pushed the clouds along] in Pebbleford",
    "cloudy": "@when, [grey|thick|low|soft] clouds hung over [Pebbleford|the roofs|the river|the fields]; "
    "it was a [grey|cloudy|dull|mild] [morning|day] in Pebbleford[, and there was no sun|]; "
    "@when, the sky over [Pebbleford|the town|the river] was [grey|full of clouds|as grey as slate]",
    "sunny_still": "the sun was still [shining|high|warm|bright]; the sky stayed [blue|clear]; "
    "there was [still not a cloud|not one cloud] in the sky; the [sun|warm sun] made [long|short] shadows",
    "windy_still": "the wind was still [blowing|strong|cold|wild]; the wind [pulled|tugged] at {a.his} "
    "[coat|sleeves|hair or fur|back]; the wind [whistled|howled|sang] [round the corners|in the trees]",
    "cloudy_still": "the sky was still [grey|dull|full of clouds]; the clouds [were still low|had not moved]; "
    "there was [still no sun|no sun at all]; the grey [clouds|sky] had not [gone|changed]",
    "glad": "glad; happy; pleased; proud; delighted; cheerful",
    "sad": "sad; worried; upset; unhappy; gloomy",
    "very": "very; so; really; quite",
    "went": "went; walked; hurried; ran; set off; trotted",
    "looked": "looked; searched; hunted; peered",
    "smiled": "smiled; laughed; beamed; grinned; nodded; clapped",
    "said": "said; answered; replied; called",
    "oh": "oh dear; oh no; goodness; dear me",
    "yes": "of course; yes; gladly; with pleasure; certainly; why not",
    "thanks": "thank you; many thanks; thank you so much; thank you, thank you; how kind; you are a true friend",
    "soon": "soon; before long; after a while; a little later; by and by; in the end; at last",
    "then": "then; next; after that; a little later",
    "evening": "that evening; at supper; that night; when the day was over; before bed; at sunset",
    "taste": "sweet; warm; rich; soft; fresh; good; tasty; creamy",
    "smell": "warm bread; wet grass; wood smoke; salt water; fresh paint; old books; cut hay; ripe apples",
    "sound": "a bell; a distant drum; a [man|woman|child] singing; a cart on the stones; a [dog|goose|horse] far away; "
    "the church clock; water running; an axe in the wood",
    "extra": "on the way {a.he} [saw|met|passed|counted|noticed] @seen [@where_seen|]; the [air|street|path|lane] "
    "smelled of @smell[ and @smell|]; somewhere {a.he} [could hear|heard] @sound[ and @sound|]; "
    "[a|the] @mood @creature [watched|looked up|ran off|hid|followed {a.him}] [@where_seen|]",
    "pack": "[a|one] [slice|piece] of [bread|cheese|cake|pie]; @number [apples|pears|plums|nuts|rolls|buns|eggs]; "
    "a [bottle|jug|cup] of [milk|water|tea|juice]; a [warm|thick|clean|dry] [blanket|scarf|towel|coat]; "
    "a [short|long|thin|strong] [rope|stick|string|ladder]",
}

LISTS = {name: entries.split("; ") for name, entries in _LISTS.items()}
