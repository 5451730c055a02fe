"""Pebbleford: its people, animals, places and things. All is fixed, and stories respect it."""

from dataclasses import dataclass


def listed(text: str) -> list[str]:
    return text.split(", ")


COLOURS = listed("red, blue, green, yellow, white, black, brown, orange, purple, grey, pink, "
                 "golden")
ANIMALS = listed("badger, mouse, hare, cat, donkey, owl, fox, dog, otter, hen, hedgehog, "
                 "tortoise, crow, goat")
WILD = listed("robin, squirrel, duck, sheep, frog, snail, swan, rabbit, pigeon, cow, horse, "
              "beetle, bat, goose")

# Portable things that a story may colour, lose, hide, give and trade.
THINGS = listed(
    "kite, lantern, basket, scarf, whistle, drum, umbrella, teapot, ball, hat, button, ribbon, "
    "toy boat, cup, bucket, spade, mirror, blanket, cushion, flute, bell, notebook, map, jar, "
    "box, bag, glove, coat, belt, ring, marble, candle, plate, stool, rope, net, fishing rod, "
    "broom, rake, kettle, vase, mask, puppet, spinning top, doll, purse, pencil, comb, brush, "
    "apron, bowl, tray, mug, feather, pillow, skipping rope, paintbox, trumpet, watering can, "
    "toy horse"
)

# food: first and second ingredient, how it is served
FOODS = {
    line.split(": ")[0]: tuple(line.split(": ")[1].split(", "))
    for line in """plum cake: plums, flour, a slice
onion soup: onions, butter, a bowl
cheese pie: cheese, eggs, a slice
honey bread: honey, flour, a slice
apple tart: apples, sugar, a slice
pea soup: peas, mint, a bowl
nut rolls: nuts, flour, a plate
carrot stew: carrots, beans, a bowl
cherry pudding: cherries, milk, a bowl
potato pancakes: potatoes, eggs, a plate
mushroom pie: mushrooms, cream, a slice
lemon biscuits: lemons, butter, a plate
oat porridge: oats, milk, a bowl
ginger buns: ginger, sugar, a plate
pumpkin soup: pumpkins, cream, a bowl
raisin buns: raisins, milk, a plate
pear jam: pears, sugar, a jar
berry jelly: berries, honey, a bowl
bean stew: beans, tomatoes, a bowl
walnut cake: walnuts, eggs, a slice""".splitlines()
}


@dataclass(frozen=True)
class Place:
    """`at` is "in the market square", `spot` "behind the stone fountain"; `errand` follows "to"."""

    name: str
    at: str
    feature: str
    spot: str
    errand: str
    outdoors: bool

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Person:
    """A person or a talking animal; `does` and `did` tell the job, `friend` is a name."""

    name: str
    he: str
    kind: str
    does: str
    did: str
    home: str
    near: str
    food: str
    colour: str
    friend: str
    treasure: str
    fear: str

    def __str__(self) -> str:
        return self.name

    @property
    def him(self) -> str:
        return "him" if self.he == "he" else "her"

    @property
    def his(self) -> str:
        return "his" if self.he == "he" else "her"

    @property
    def own(self) -> str:
        return f"{self.his} {self.home.split(' ', 1)[1]}"

    @property
    def serving(self) -> str:
        return f"{FOODS[self.food][2]} of {self.food}"


# name | preposition | landmark | where one finds things there | errand | (out)doors
_PLACES = """the market square | in | stone fountain | behind | buy a ball of string | out
the bakery | at | blue door | beside | fetch warm rolls | in
the school | at | brass bell | under | hear the choir | in
the library | in | round window | below | borrow a book | in
the old mill | at | wooden wheel | next to | fetch a sack of flour | in
the river bridge | on | stone arch | under | watch the boats | out
the duck pond | by | green bench | under | feed the ducks | out
the apple orchard | in | crooked ladder | under | pick apples | out
the windy hill | on | lonely pine tree | beside | look at the clouds | out
the harbour | at | red lamp | below | ask for fresh fish | out
the lighthouse | at | spiral stair | under | clean the great lamp | in
the beach | on | black rock | behind | look for shells | out
the oak wood | in | hollow oak | inside | gather acorns | out
the train station | at | tall clock | under | meet the noon train | in
the post office | in | yellow letterbox | beside | send a letter | in
the farm | on | rusty gate | by | carry hay | out
the barn | in | high loft | up in | count the lambs | in
the toy shop | in | painted sign | beneath | look at the puppets | in
the boathouse | in | coil of white rope | behind | scrub a boat | in
the meadow | in | flat grey stone | on | pick daisies | out"""

# name | pronoun | kind | does/did | home near place | food | colour | friend | treasure | fear
_PEOPLE = """Mina | she | baker | bakes/baked bread | a tall house, the bakery | plum cake | red | Otto | silver spoon | thunder
Otto | he | postman | brings/brought letters | a narrow house, the post office | onion soup | blue | Mina | tin whistle | geese
Tilly | she | girl | collects/collected shells | a white cottage, the beach | berry jelly | yellow | Pip | glass marble | the dark
Pip | he | mouse | sweeps/swept the school | a snug hole, the school | cheese pie | brown | Tilly | paper star | thunder
Jonas | he | miller | grinds/ground corn | a stone house, the old mill | oat porridge | white | Bramble | copper kettle | high places
Bramble | he | badger | mends/mended shoes | a deep burrow, the oak wood | mushroom pie | black | Jonas | brass compass | bees
Vera | she | teacher | teaches/taught the little ones | a brick house, the school | lemon biscuits | purple | Hugo | feather pen | spiders
Hugo | he | farmer | grows/grew wheat | a long farmhouse, the farm | bean stew | green | Vera | straw doll | deep water
Lotte | she | girl | draws/drew pictures | an attic room, the market square | cherry pudding | pink | Emil | ivory paintbrush | geese
Emil | he | boy | flies/flew kites | a wooden hut, the windy hill | potato pancakes | red | Lotte | pocket watch | fog
Nora | she | doctor | looks/looked after the sick | a yellow house, the market square | pea soup | white | Hazel | velvet hat | high places
Hazel | she | hare | carries/carried messages | a grassy den, the meadow | carrot stew | orange | Nora | silk ribbon | the dark
Felix | he | fisher | catches/caught fish | a small hut, the harbour | bean stew | grey | Tansy | cork boat | fog
Tansy | she | cat | watches/watched the boats | a warm loft, the boathouse | raisin buns | golden | Felix | pearl button | deep water
Greta | she | gardener | plants/planted roses | a round house, the apple orchard | apple tart | green | Barley | clay bird | spiders
Barley | he | donkey | pulls/pulled the hay cart | a dry stable, the farm | carrot stew | yellow | Greta | straw hat | bees
Oskar | he | clockmaker | mends/mended clocks | a tiny house, the train station | walnut cake | golden | Olwen | iron key | thunder
Olwen | she | owl | reads/read old maps | a tree house, the oak wood | nut rolls | purple | Oskar | small telescope | fog
Ida | she | girl | sings/sang in the choir | a corner house, the library | honey bread | blue | Leo | music box | bees
Leo | he | boy | builds/built toy trains | a little flat, the train station | ginger buns | black | Ida | tin soldier | spiders
Ruth | she | librarian | lends/lent books | a quiet house, the library | pumpkin soup | brown | Anton | picture book | the dark
Anton | he | carpenter | makes/made chairs | a log house, the oak wood | onion soup | orange | Ruth | lucky coin | geese
Clara | she | painter | paints/painted signs | a bright room, the toy shop | pear jam | red | Milo | crystal bead | high places
Milo | he | boy | juggles/juggled apples | a low cottage, the apple orchard | plum cake | green | Clara | wooden horse | deep water
Edda | she | sailor | sails/sailed to the islands | a blue cottage, the harbour | lemon biscuits | white | Sorrel | sea shell | spiders
Sorrel | he | fox | tells/told tales | a sandy den, the windy hill | pea soup | orange | Edda | painted egg | thunder
Rufus | he | tailor | sews/sewed coats | a thin house, the market square | pumpkin soup | pink | Biscuit | golden thimble | fog
Biscuit | he | dog | guards/guarded the barn | a wooden kennel, the barn | ginger buns | brown | Rufus | little drum | the dark
Paula | she | potter | shapes/shaped clay pots | a clay house, the duck pond | walnut cake | grey | Pebble | stone frog | bees
Pebble | she | otter | rows/rowed the ferry | a river den, the river bridge | berry jelly | blue | Paula | leather purse | high places
Simon | he | keeper | lights/lit the great lamp | a round room, the lighthouse | potato pancakes | yellow | Dot | snow globe | geese
Dot | she | hen | sells/sold eggs | a neat coop, the farm | oat porridge | red | Simon | wax candle | deep water
Wanda | she | beekeeper | keeps/kept bees | a garden house, the meadow | honey bread | golden | Nettle | woollen bear | fog
Nettle | he | hedgehog | rakes/raked leaves | a leafy nest, the apple orchard | mushroom pie | purple | Wanda | lace cushion | deep water
Theo | he | boy | studies/studied beetles | a back room, the toy shop | cherry pudding | black | Mossy | carved flute | high places
Mossy | she | tortoise | grows/grew lettuce | a mossy cave, the duck pond | apple tart | grey | Theo | oak stick | thunder
Alma | she | singer | plays/played the harp | a rose cottage, the river bridge | raisin buns | pink | Bruno | bone comb | spiders
Bruno | he | builder | lays/laid bricks | a red house, the old mill | cheese pie | orange | Alma | brass whistle | the dark
Quill | he | crow | calls/called out the news | a high nest, the lighthouse | nut rolls | white | Juniper | glass bottle | bees
Juniper | she | goat | makes/made goat cheese | a hill barn, the windy hill | pear jam | green | Quill | silver bell | geese"""  # noqa: E501, one row a person reads best


def _read_place(line: str) -> Place:
    name, preposition, feature, spot, errand, doors = line.split(" | ")
    return Place(name, f"{preposition} {name}", feature, f"{spot} the {feature}", errand, doors ==
        "out")


def _read_person(line: str) -> Person:
    name, he, kind, job, home, *rest = line.split(" | ")
    (verb, _, tail), (house, near) = job.partition(" "), home.split(", ")
    present, past = verb.split("/")
    does, did = f"{present} {tail}", f"{past} {tail}"
    return Person(name, he, kind, does, did, f"{house} near {near}", near, *rest)


PLACES = [_read_place(line) for line in _PLACES.splitlines()]
PEOPLE = [_read_person(line) for line in _PEOPLE.splitlines()]
PERSON = {person.name: person for person in PEOPLE}
PLACE = {place.name: place for place in PLACES}
