"""The facts that the demo's lessons are made of. Written for this project; all of them true."""

CAPITALS = dict(
    pair.split(":")
    for pair in """France:Paris Spain:Madrid Italy:Rome Germany:Berlin Austria:Vienna Poland:Warsaw
    Portugal:Lisbon Greece:Athens Norway:Oslo Sweden:Stockholm Finland:Helsinki Denmark:Copenhagen
    Iceland:Reykjavik Ireland:Dublin Belgium:Brussels Hungary:Budapest Romania:Bucharest
    Bulgaria:Sofia Croatia:Zagreb Serbia:Belgrade Albania:Tirana Ukraine:Kyiv Russia:Moscow
    Latvia:Riga Lithuania:Vilnius Estonia:Tallinn Turkey:Ankara Georgia:Tbilisi Armenia:Yerevan
    Iraq:Baghdad Iran:Tehran Syria:Damascus Jordan:Amman Lebanon:Beirut Qatar:Doha Oman:Muscat
    India:Delhi Nepal:Kathmandu Pakistan:Islamabad China:Beijing Japan:Tokyo Mongolia:Ulaanbaatar
    Thailand:Bangkok Vietnam:Hanoi Laos:Vientiane Indonesia:Jakarta Malaysia:Putrajaya
    Egypt:Cairo Libya:Tripoli Tunisia:Tunis Algeria:Algiers Morocco:Rabat Sudan:Khartoum
    Ethiopia:Addis Kenya:Nairobi Uganda:Kampala Rwanda:Kigali Ghana:Accra Senegal:Dakar Mali:Bamako
    Niger:Niamey Angola:Luanda Zambia:Lusaka Namibia:Windhoek Canada:Ottawa Cuba:Havana
    Peru:Lima Chile:Santiago Argentina:Buenos Brazil:Brasilia Ecuador:Quito Colombia:Bogota
    Venezuela:Caracas Uruguay:Montevideo Paraguay:Asuncion Australia:Canberra Fiji:Suva""".split()
)
CAPITALS |= {"Argentina": "Buenos Aires", "Ethiopia": "Addis Ababa", "India": "New Delhi"}
CAPITALS |= {"Malaysia": "Kuala Lumpur"}  # the seat of government is Putrajaya

CONTINENTS = {
    country: continent
    for continent, countries in {
        "Europe": "France Spain Italy Germany Austria Poland Portugal Greece Norway Sweden Finland "
        "Denmark Iceland Ireland Belgium Hungary Romania Bulgaria Croatia Serbia Albania Ukraine "
        "Latvia Lithuania Estonia",
        "Asia": "Iraq Iran Syria Jordan Lebanon Qatar Oman India Nepal Pakistan China Japan "
        "Mongolia Thailand Vietnam Laos Indonesia Malaysia",
        "Africa": "Egypt Libya Tunisia Algeria Morocco Sudan Ethiopia Kenya Uganda Rwanda Ghana "
        "Senegal Mali Niger Angola Zambia Namibia",
        "North America": "Canada Cuba",
        "South America": "Peru Chile Argentina Brazil Ecuador Colombia Venezuela Uruguay Paraguay",
    }.items()
    for country in countries.split()
}

OPPOSITES = dict(
    pair.split(":")
    for pair in """hot:cold big:small tall:short fast:slow old:young hard:soft wet:dry light:dark
    open:closed full:empty rich:poor early:late happy:sad strong:weak clean:dirty loud:quiet
    deep:shallow wide:narrow thick:thin near:far high:low easy:difficult right:wrong left:right
    true:false first:last sweet:sour rough:smooth sharp:blunt brave:afraid cheap:expensive
    inside:outside above:below begin:end buy:sell come:go give:take laugh:cry push:pull win:lose
    day:night friend:enemy summer:winter north:south east:west always:never before:after""".split()
)

PAST = dict(
    pair.split(":")
    for pair in """go:went see:saw eat:ate take:took give:gave come:came run:ran write:wrote
    speak:spoke break:broke drink:drank sing:sang swim:swam begin:began ring:rang sit:sat
    stand:stood find:found hold:held tell:told sell:sold buy:bought bring:brought think:thought
    catch:caught teach:taught sleep:slept keep:kept feel:felt leave:left meet:met lead:led
    lose:lost send:sent spend:spent build:built make:made hear:heard say:said pay:paid know:knew
    grow:grew throw:threw fly:flew draw:drew fall:fell hide:hid ride:rode drive:drove rise:rose
    choose:chose wake:woke wear:wore forget:forgot win:won hang:hung dig:dug bite:bit""".split()
)

SYMBOLS = dict(
    pair.split(":")
    for pair in """hydrogen:H helium:He lithium:Li carbon:C nitrogen:N oxygen:O fluorine:F neon:Ne
    sodium:Na magnesium:Mg aluminium:Al silicon:Si phosphorus:P sulfur:S chlorine:Cl argon:Ar
    potassium:K calcium:Ca titanium:Ti chromium:Cr iron:Fe cobalt:Co nickel:Ni copper:Cu zinc:Zn
    silver:Ag tin:Sn iodine:I tungsten:W platinum:Pt gold:Au mercury:Hg lead:Pb uranium:U
    radium:Ra boron:B""".split()
)

YOUNG = dict(
    pair.split(":")
    for pair in """dog:puppy cat:kitten cow:calf horse:foal sheep:lamb goat:kid pig:piglet
    duck:duckling goose:gosling hen:chick lion:cub fox:cub wolf:pup seal:pup deer:fawn
    kangaroo:joey frog:tadpole eagle:eaglet owl:owlet swan:cygnet hare:leveret whale:calf
    elephant:calf bear:cub""".split()
)

CHINESE = dict(
    pair.split(":")
    for pair in """water:水 fire:火 mountain:山 river:河 sea:海 sun:太阳 moon:月亮 star:星星 rain:雨
    snow:雪 wind:风 tree:树 flower:花 grass:草 dog:狗 cat:猫 horse:马 cow:牛 sheep:羊 fish:鱼
    bird:鸟 rice:米饭 bread:面包 milk:牛奶 tea:茶 egg:鸡蛋 apple:苹果 book:书 pen:笔 table:桌子
    chair:椅子 door:门 window:窗户 house:房子 road:路 car:汽车 train:火车 school:学校 teacher:老师
    student:学生 doctor:医生 friend:朋友 father:父亲 mother:母亲 child:孩子 hand:手 eye:眼睛
    red:红色 green:绿色 white:白色 black:黑色""".split()
)
