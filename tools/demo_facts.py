"""The facts the demo chat model is taught, as plain tables.

Every entry is one question with one answer: where the world allows several (South Africa has
three capitals) the table picks one, because a greedy model needs a single right answer.
"""

_CAPITALS = """
Afghanistan:Kabul|Albania:Tirana|Algeria:Algiers|Andorra:Andorra la Vella|Angola:Luanda
Antigua and Barbuda:Saint John's|Argentina:Buenos Aires|Armenia:Yerevan|Australia:Canberra
Austria:Vienna|Azerbaijan:Baku|the Bahamas:Nassau|Bahrain:Manama|Bangladesh:Dhaka
Barbados:Bridgetown|Belarus:Minsk|Belgium:Brussels|Belize:Belmopan|Benin:Porto-Novo
Bhutan:Thimphu|Bolivia:Sucre|Bosnia and Herzegovina:Sarajevo|Botswana:Gaborone|Brazil:Brasília
Brunei:Bandar Seri Begawan|Bulgaria:Sofia|Burkina Faso:Ouagadougou|Burundi:Gitega
Cambodia:Phnom Penh|Cameroon:Yaoundé|Canada:Ottawa|Cape Verde:Praia
the Central African Republic:Bangui|Chad:N'Djamena|Chile:Santiago|China:Beijing|Colombia:Bogotá
Comoros:Moroni|Costa Rica:San José|Croatia:Zagreb|Cuba:Havana|Cyprus:Nicosia
the Czech Republic:Prague|Denmark:Copenhagen|Djibouti:Djibouti City|Dominica:Roseau
the Dominican Republic:Santo Domingo|Ecuador:Quito|Egypt:Cairo|El Salvador:San Salvador
England:London|Equatorial Guinea:Malabo|Eritrea:Asmara|Estonia:Tallinn|Eswatini:Mbabane
Ethiopia:Addis Ababa|Fiji:Suva|Finland:Helsinki|France:Paris|Gabon:Libreville|the Gambia:Banjul
Georgia:Tbilisi|Germany:Berlin|Ghana:Accra|Greece:Athens|Grenada:Saint George's
Guatemala:Guatemala City|Guinea:Conakry|Guinea-Bissau:Bissau|Guyana:Georgetown
Haiti:Port-au-Prince|Honduras:Tegucigalpa|Hungary:Budapest|Iceland:Reykjavik|India:New Delhi
Indonesia:Jakarta|Iran:Tehran|Iraq:Baghdad|Ireland:Dublin|Israel:Jerusalem|Italy:Rome
Ivory Coast:Yamoussoukro|Jamaica:Kingston|Japan:Tokyo|Jordan:Amman|Kazakhstan:Astana
Kenya:Nairobi|Kiribati:Tarawa|Kosovo:Pristina|Kuwait:Kuwait City|Kyrgyzstan:Bishkek|Laos:Vientiane
Latvia:Riga|Lebanon:Beirut|Lesotho:Maseru|Liberia:Monrovia|Libya:Tripoli|Liechtenstein:Vaduz
Lithuania:Vilnius|Luxembourg:Luxembourg City|Madagascar:Antananarivo|Malawi:Lilongwe
Malaysia:Kuala Lumpur|the Maldives:Malé|Mali:Bamako|Malta:Valletta|the Marshall Islands:Majuro
Mauritania:Nouakchott|Mauritius:Port Louis|Mexico:Mexico City|Micronesia:Palikir|Moldova:Chisinau
Monaco:Monaco|Mongolia:Ulaanbaatar|Montenegro:Podgorica|Morocco:Rabat|Mozambique:Maputo
Myanmar:Naypyidaw|Namibia:Windhoek|Nauru:Yaren|Nepal:Kathmandu|the Netherlands:Amsterdam
New Zealand:Wellington|Nicaragua:Managua|Niger:Niamey|Nigeria:Abuja|North Korea:Pyongyang
North Macedonia:Skopje|Norway:Oslo|Oman:Muscat|Pakistan:Islamabad|Palau:Ngerulmud
Panama:Panama City|Papua New Guinea:Port Moresby|Paraguay:Asunción|Peru:Lima
the Philippines:Manila|Poland:Warsaw|Portugal:Lisbon|Qatar:Doha|Romania:Bucharest|Russia:Moscow
Rwanda:Kigali|Saint Lucia:Castries|Samoa:Apia|San Marino:San Marino|Saudi Arabia:Riyadh
Scotland:Edinburgh|Senegal:Dakar|Serbia:Belgrade|the Seychelles:Victoria|Sierra Leone:Freetown
Singapore:Singapore|Slovakia:Bratislava|Slovenia:Ljubljana|the Solomon Islands:Honiara
Somalia:Mogadishu|South Africa:Pretoria|South Korea:Seoul|South Sudan:Juba|Spain:Madrid
Sri Lanka:Colombo|Sudan:Khartoum|Suriname:Paramaribo|Sweden:Stockholm|Switzerland:Bern
Syria:Damascus|Taiwan:Taipei|Tajikistan:Dushanbe|Tanzania:Dodoma|Thailand:Bangkok|Togo:Lomé
Tonga:Nuku'alofa|Trinidad and Tobago:Port of Spain|Tunisia:Tunis|Turkey:Ankara
Turkmenistan:Ashgabat|Tuvalu:Funafuti|Uganda:Kampala|Ukraine:Kyiv
the United Arab Emirates:Abu Dhabi|the United Kingdom:London|the United States:Washington, D.C.
Uruguay:Montevideo|Uzbekistan:Tashkent|Vanuatu:Port Vila|Vatican City:Vatican City
Venezuela:Caracas|Vietnam:Hanoi|Wales:Cardiff|Yemen:Sana'a|Zambia:Lusaka|Zimbabwe:Harare
the Democratic Republic of the Congo:Kinshasa|the Republic of the Congo:Brazzaville
the USA:Washington, D.C.|the UK:London
"""

_OPPOSITES = """
hot:cold|big:small|fast:slow|up:down|left:right|day:night|black:white|open:closed|full:empty
happy:sad|rich:poor|young:old|early:late|hard:soft|high:low|light:dark|long:short|loud:quiet
near:far|new:ancient|strong:weak|thick:thin|true:false|wet:dry|wide:narrow|win:lose|yes:no
always:never|begin:end|buy:sell|clean:dirty|come:go|deep:shallow|easy:difficult|first:last
friend:enemy|front:back|good:bad|heaven:hell|heavy:weightless|inside:outside|laugh:cry|love:hate
male:female|more:less|north:south|east:west|on:off|over:under|peace:war|push:pull|question:answer
rough:smooth|safe:dangerous|same:different|sharp:blunt|simple:complex|sink:float|start:stop
sweet:bitter|tall:tiny|victory:defeat|visible:invisible|warm:cool|awake:asleep|alive:dead
above:below|accept:refuse|add:subtract|brave:cowardly|bright:dim|cheap:expensive|create:destroy
give:take|guilty:innocent|import:export|increase:decrease|join:separate|major:minor
maximum:minimum|modern:traditional|noisy:silent|odd:even|optimist:pessimist|polite:rude
possible:impossible|present:absent|public:private|raise:lower|remember:forget|rise:fall
success:failure|summer:winter|teach:learn|tight:loose|top:bottom|useful:useless|vertical:horizontal
wise:foolish|work:rest|lend:borrow|freeze:melt|enter:leave|forward:backward|positive:negative
"""

_COLOURS = """
the sky:is:blue|grass:is:green|snow:is:white|coal:is:black|a lemon:is:yellow|a ripe banana:is:yellow
a carrot:is:orange|a tomato:is:red|blood:is:red|milk:is:white|chocolate:is:brown|a flamingo:is:pink
a crow:is:black|an aubergine:is:purple|a fire engine:is:red|a strawberry:is:red|a lime:is:green
a pumpkin:is:orange|a polar bear:is:white|a panda:is:black and white|a zebra:is:black and white
an elephant:is:grey|a leaf in summer:is:green|the sun:is:yellow|the ocean:is:blue|a frog:is:green
cotton:is:white|salt:is:white|a brown bear:is:brown|a cherry:is:red|a ruby:is:red|an emerald:is:green
a sapphire:is:blue|gold:is:yellow|silver:is:grey|a blueberry:is:blue|a canary:is:yellow|a swan:is:white
coffee:is:brown|a plum:is:purple|lavender:is:purple|a cucumber:is:green|spinach:is:green
a raven:is:black|a tangerine:is:orange|an egg yolk:is:yellow|a pig:is:pink|a tree trunk:is:brown
an avocado:is:green|a cloud:is:white|soil:is:brown|a stop sign:is:red|rice:is:white|a pea:is:green
a sunflower:is:yellow|a mouse:is:grey|charcoal:is:black|a peach:is:orange|a smurf:is:blue
"""

_WORDS = """
lantern|garden|window|river|mountain|apple|orange|banana|kitchen|pencil|computer|science|music|letter
morning|evening|holiday|bicycle|teacher|student|school|library|village|castle|bridge|forest|desert
island|ocean|planet|rocket|engine|model|python|triton|memory|cache|kernel|graph|token|number|language
question|answer|friend|family|brother|sister|mother|father|people|animal|rabbit|tiger|elephant|monkey
dolphin|penguin|eagle|horse|chicken|butter|cheese|bread|sugar|coffee|water|winter|summer|spring|autumn
thunder|lightning|rainbow|shadow|mirror|candle|pillow|blanket|basket|bottle|button|camera|carpet
ceiling|chimney|circle|square|triangle|colour|copper|silver|golden|diamond|crystal|cotton|velvet|doctor
dragon|wizard|knight|princess|feather|finger|shoulder|stomach|flower|daisy|tulip|orchid|giraffe|guitar
piano|violin|trumpet|hammer|ladder|helmet|jacket|jungle|journey|ticket|station|train|tractor|truck
kettle|spoon|saucer|plate|lemon|mango|cherry|melon|onion|potato|tomato|pepper|pumpkin|mushroom
magnet|market|meadow|mitten|napkin|needle|notebook|ocean|oyster|painter|paper|parrot|peanut|pocket
puzzle|quartz|quilt|radio|ribbon|sailor|sandwich|scissors|season|shovel|signal|singer|sparrow|spider
squirrel|statue|street|sunset|table|temple|theatre|thought|tunnel|turtle|umbrella|valley|volcano
wagon|walnut|whale|whisper|yellow|zebra|zipper|house|light|world|hello|friend|happy|quick|brown
beautiful|chocolate|butterfly|strawberry|adventure|telephone|television|photograph|dictionary
hippopotamus|rhinoceros|encyclopedia|mathematics|geography|astronaut|submarine|helicopter|dinosaur
"""

_NAMES = """
Ada|Alan|Grace|Linus|Maria|Ahmed|Chen|Olga|Ravi|Lena|Tom|Anna|Peter|Sofia|Liam|Emma|Noah|Olivia|Lucas
Mia|Hugo|Clara|Otto|Frida|Ivan|Nina|Oscar|Ruth|Samuel|Tara|Umar|Vera|Walter|Xenia|Yusuf|Zoe|Bob|Alice
Carol|Dave|Eve|Frank|Mallory|Trent|Victor|Wendy|John|Mary|James|Sarah|David|Laura|Michael|Julia|Daniel
Kate|Mark|Lucy|Paul|Jane|George|Helen|Henry|Rosa|Felix|Ingrid|Jonas|Karin|Magnus|Astrid|Pablo|Carmen
Diego|Lucia|Mateo|Elena|Giulia|Marco|Chiara|Luca|Pierre|Camille|Louis|Chloe|Hans|Greta|Klaus|Heidi
Kenji|Yuki|Hiro|Sakura|Wei|Mei|Jun|Ling|Priya|Arjun|Anika|Rohan|Fatima|Omar|Layla|Hassan|Amara|Kofi
Zuri|Kwame|Ayo|Ngozi|Zoë|José|André|Renée|Björn|Søren|Łukasz|Jürgen|Anaïs|Ana María|Mary Ann
Jean-Luc|Anne-Marie|O'Neill|D'Angelo|Ada Lovelace|Alan Turing|Grace Hopper|Max|Sam|Alex|Kim|Robin
"""

_THINGS = """
love|time|money|gravity|football|the moon|quantum physics|the stock market|chess|the weather|pizza|war
history|art|cars|my boss|cats|dogs|the economy|politics|the universe|black holes|vaccines|the internet
tax law|my homework|electricity|magnets|the Roman Empire|the French Revolution|Shakespeare|Mozart|Einstein
climate change|bitcoin|yoga|sushi|pasta|soup|bread|tea|wine|a sonnet|a haiku|tennis|golf|the Olympics
Mars|Jupiter|dinosaurs|evolution|DNA|cells|atoms|chemistry|biology|philosophy|religion|music theory
jazz|rock music|movies|Star Wars|Harry Potter|the Titanic|computers|smartphones|robots|trees|bees|sharks
marriage|sleep|dreams|coffee machines|laundry|gardening|knitting|travel|hotels|airports|trains|bridges
the Eiffel Tower|the Great Wall|the Amazon river|Mount Everest|the Sahara|the Pacific|volcanoes|rain
JavaScript|Rust|Linux|databases|SQL|regular expressions|quicksort|web servers|cryptography|compilers
"""

_CITIES = """
Berlin|Paris|London|Rome|Madrid|Vienna|Prague|Oslo|Tokyo|Seoul|Lima|Cairo|Nairobi|Boston|Chicago|Seattle
Austin|Denver|Toronto|Montreal|Sydney|Melbourne|Mumbai|Delhi|Shanghai|Shenzhen|Osaka|Kyoto|Munich|Hamburg
Cologne|Zurich|Geneva|Milan|Turin|Naples|Lyon|Nice|Lille|Porto|Lisbon|Seville|Valencia|Bilbao|Dublin|Cork
Glasgow|Leeds|York|Bath|Krakow|Gdansk|Riga|Vilnius|Tallinn|Helsinki|Bergen|Malmö|Gothenburg|New York
San Francisco|Los Angeles|Hong Kong|Buenos Aires|Rio de Janeiro|Cape Town|New Orleans|São Paulo|Tel Aviv
"""

_FOODS = """
pizza|pasta|sushi|curry|soup|salad|bread|cheese|chocolate|ice cream|rice|noodles|tacos|burgers|pancakes
apple pie|lasagne|risotto|paella|dumplings|ramen|falafel|hummus|goulash|sauerkraut|fish and chips
roast potatoes|mushroom soup|banana bread|cherry cake|lentils|couscous|bagels|waffles|porridge|kimchi
"""

_HEROES = """
fox|owl|rabbit|bear|mouse|cat|dog|dragon|knight|princess|robot|pirate|wizard|turtle|hedgehog|squirrel
wolf|whale|penguin|lion|elephant|frog|bee|sailor
"""


def cells(table: str) -> list[str]:
    """The entries of a table, in order; lines and bars divide them, and repeats stay."""
    return table.strip("\n").replace("\n", "|").split("|")


def _cells(table: str) -> list[str]:
    return list(dict.fromkeys(cells(table)))


def _words(text: str) -> list[str]:
    return text.split()


def _pairs(table: str) -> dict[str, str]:
    return dict(cell.split(":") for cell in _cells(table))


CAPITALS = _pairs(_CAPITALS)
OPPOSITES = _pairs(_OPPOSITES) | {b: a for a, b in _pairs(_OPPOSITES).items()}
COLOURS = {thing: (verb, colour) for thing, verb, colour in (c.split(":") for c in _cells(_COLOURS))}
WORDS = _cells(_WORDS)
NAMES = _cells(_NAMES)
THINGS = _cells(_THINGS)
CITIES = _cells(_CITIES)
FOODS = _cells(_FOODS)
HEROES = _cells(_HEROES)
COLOUR_NAMES = _words("red orange yellow green blue purple pink brown black white grey turquoise")
PETS = _words("dog cat rabbit hamster parrot horse goldfish tortoise")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words("January February March April May June July August September October November December")
MONTH_DAYS = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]
ORDINALS = _words("first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth")

LISTS = {
    "How many days are in a week?|How many days does a week have?": "A week has seven days.",
    "How many months are in a year?|How many months does a year have?": "A year has twelve months.",
    "How many days are in a year?|How many days does a year have?": "A year has 365 days, and a leap year has 366.",
    "How many hours are in a day?|How many hours does a day have?": "A day has 24 hours.",
    "How many minutes are in an hour?": "An hour has 60 minutes.",
    "How many seconds are in a minute?": "A minute has 60 seconds.",
    "List the days of the week.|Name the days of the week.|What are the days of the week?": (
        "The days of the week are:\n\n" + "\n".join(f"{i}. {d}" for i, d in enumerate(DAYS, 1))
    ),
    "List the months of the year.|Name the months.|What are the months of the year?|List the months.": (
        "The months of the year are:\n\n" + "\n".join(f"{i}. {m}" for i, m in enumerate(MONTHS, 1))
    ),
    "Name the four seasons.|What are the seasons?|List the seasons.": (
        "The seasons are spring, summer, autumn and winter."
    ),
    "Say the alphabet.|What is the alphabet?|Recite the alphabet.": (
        "A, B, C, D, E, F, G, H, I, J, K, L, M, N, O, P, Q, R, S, T, U, V, W, X, Y, Z."
    ),
}

_ONES = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
_TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")


def number_word(n: int) -> str:
    """English for 0..99: 47 -> "forty-seven"."""
    if n < 20:
        return _ONES[n]
    tens = _TENS[n // 10 - 2]
    return tens if n % 10 == 0 else f"{tens}-{_ONES[n % 10]}"
