"""The vocabulary of the world: every noun, the emoji that show it, and the other words that name it."""

from __future__ import annotations

from dataclasses import dataclass

from ovam_core.data.voc import VOC_CLASSES as VOC_CLASSES


@dataclass(frozen=True)
class Noun:
    """One kind of object: `name`, its pictures (emoji), synonyms and hypernyms used in captions."""

    name: str
    emoji: tuple[str, ...]
    synonyms: tuple[str, ...] = ()
    hypernyms: tuple[str, ...] = ()


def _noun(name: str, emoji: str, synonyms: str = "", hypernyms: str = "") -> Noun:
    def split(text: str) -> tuple[str, ...]:
        return tuple(filter(None, (part.strip() for part in text.split(","))))

    return Noun(name, tuple(emoji.split()), split(synonyms), split(hypernyms))


# "@table" names a picture that sprites.py draws itself: no emoji shows a dining table.
VOC_NOUNS = (
    _noun("aeroplane", "✈ 🛩", "airplane, plane", "vehicle"),
    _noun("bicycle", "🚲", "bike", "vehicle"),
    _noun("bird", "🐦 🦜", "", "animal"),
    _noun("boat", "⛵ 🚤", "ship", "vehicle"),
    _noun("bottle", "🍾 🍼", "", "object"),
    _noun("bus", "🚌 🚍", "coach", "vehicle"),
    _noun("car", "🚗 🚕", "automobile", "vehicle"),
    _noun("cat", "🐈 🐱", "kitten", "pet, animal"),
    _noun("chair", "🪑", "seat", "furniture"),
    _noun("cow", "🐄 🐮", "", "animal"),
    _noun("dining table", "@table @roundtable", "table", "furniture"),
    _noun("dog", "🐕 🐶", "puppy", "pet, animal"),
    _noun("horse", "🐎 🐴", "pony", "animal"),
    _noun("motorbike", "🏍 🛵", "motorcycle", "vehicle"),
    _noun("person", "🧍 👩", "human", "people"),
    _noun("potted plant", "🪴", "houseplant", "plant"),
    _noun("sheep", "🐑 🐏", "lamb", "animal"),
    _noun("sofa", "🛋", "couch", "furniture"),
    _noun("train", "🚆 🚂", "locomotive", "vehicle"),
    _noun("tv", "📺", "television, monitor", "object"),
)

FURTHER_NOUNS = (
    _noun("apple", "🍎 🍏", "", "fruit, food"),
    _noun("banana", "🍌", "", "fruit, food"),
    _noun("orange", "🍊", "tangerine", "fruit, food"),
    _noun("lemon", "🍋", "", "fruit, food"),
    _noun("grapes", "🍇", "", "fruit, food"),
    _noun("strawberry", "🍓", "", "fruit, food"),
    _noun("watermelon", "🍉", "melon", "fruit, food"),
    _noun("cherry", "🍒", "", "fruit, food"),
    _noun("pineapple", "🍍", "", "fruit, food"),
    _noun("carrot", "🥕", "", "vegetable, food"),
    _noun("tomato", "🍅", "", "vegetable, food"),
    _noun("broccoli", "🥦", "", "vegetable, food"),
    _noun("corn", "🌽", "", "vegetable, food"),
    _noun("mushroom", "🍄", "", "food"),
    _noun("bread", "🍞", "loaf", "food"),
    _noun("cheese", "🧀", "", "food"),
    _noun("pizza", "🍕", "", "food"),
    _noun("burger", "🍔", "hamburger", "food"),
    _noun("cake", "🎂 🍰", "", "food"),
    _noun("donut", "🍩", "doughnut", "food"),
    _noun("cookie", "🍪", "", "food"),
    _noun("egg", "🥚", "", "food"),
    _noun("cup", "☕ 🍵", "mug", "object"),
    _noun("fork", "🍴", "cutlery", "object"),
    _noun("knife", "🔪", "", "object"),
    _noun("spoon", "🥄", "", "object"),
    _noun("bear", "🐻 🐻‍❄️", "", "animal"),
    _noun("elephant", "🐘", "", "animal"),
    _noun("giraffe", "🦒", "", "animal"),
    _noun("zebra", "🦓", "", "animal"),
    _noun("lion", "🦁", "", "animal"),
    _noun("tiger", "🐅 🐯", "", "animal"),
    _noun("monkey", "🐒 🐵", "ape", "animal"),
    _noun("rabbit", "🐇 🐰", "bunny", "pet, animal"),
    _noun("mouse", "🐁 🐭", "", "animal"),
    _noun("pig", "🐖 🐷", "", "animal"),
    _noun("goat", "🐐", "", "animal"),
    _noun("camel", "🐫 🐪", "", "animal"),
    _noun("fox", "🦊", "", "animal"),
    _noun("panda", "🐼", "", "animal"),
    _noun("koala", "🐨", "", "animal"),
    _noun("frog", "🐸", "", "animal"),
    _noun("turtle", "🐢", "tortoise", "animal"),
    _noun("snake", "🐍", "", "animal"),
    _noun("fish", "🐟 🐠", "", "animal"),
    _noun("whale", "🐋 🐳", "", "animal"),
    _noun("dolphin", "🐬", "", "animal"),
    _noun("octopus", "🐙", "", "animal"),
    _noun("crab", "🦀", "", "animal"),
    _noun("snail", "🐌", "", "animal"),
    _noun("butterfly", "🦋", "", "insect, animal"),
    _noun("bee", "🐝", "", "insect, animal"),
    _noun("penguin", "🐧", "", "animal"),
    _noun("owl", "🦉", "", "animal"),
    _noun("chicken", "🐔 🐓", "hen, rooster", "animal"),
    _noun("truck", "🚚 🚛", "lorry", "vehicle"),
    _noun("tractor", "🚜", "", "vehicle"),
    _noun("ambulance", "🚑", "", "vehicle"),
    _noun("fire engine", "🚒", "fire truck", "vehicle"),
    _noun("helicopter", "🚁", "", "vehicle"),
    _noun("rocket", "🚀", "", "vehicle"),
    _noun("balloon", "🎈", "", "toy, object"),
    _noun("ball", "⚽ 🏀 🎾", "", "toy, object"),
    _noun("kite", "🪁", "", "toy, object"),
    _noun("teddy", "🧸", "teddy bear", "toy, object"),
    _noun("guitar", "🎸", "", "instrument"),
    _noun("trumpet", "🎺", "", "instrument"),
    _noun("violin", "🎻", "", "instrument"),
    _noun("drum", "🥁", "", "instrument"),
    _noun("laptop", "💻", "computer", "object"),
    _noun("phone", "📱", "telephone", "object"),
    _noun("camera", "📷", "", "object"),
    _noun("clock", "⏰", "", "object"),
    _noun("book", "📕 📗 📘", "", "object"),
    _noun("umbrella", "☂ ⛱", "", "object"),
    _noun("suitcase", "🧳", "luggage", "object"),
    _noun("backpack", "🎒", "", "object"),
    _noun("hat", "🎩 👒", "", "clothes"),
    _noun("shoe", "👟 👞", "", "clothes"),
    _noun("shirt", "👕", "", "clothes"),
    _noun("dress", "👗", "", "clothes"),
    _noun("glasses", "👓", "", "object"),
    _noun("key", "🔑", "", "object"),
    _noun("hammer", "🔨", "", "tool, object"),
    _noun("scissors", "✂", "", "tool, object"),
    _noun("bed", "🛏", "", "furniture"),
    _noun("door", "🚪", "", "object"),
    _noun("house", "🏠 🏡", "home", "building"),
    _noun("castle", "🏰", "", "building"),
    _noun("tent", "⛺", "", "object"),
    _noun("tree", "🌳 🌲", "", "plant"),
    _noun("palm tree", "🌴", "palm", "plant"),
    _noun("cactus", "🌵", "", "plant"),
    _noun("sunflower", "🌻", "", "flower, plant"),
    _noun("rose", "🌹", "", "flower, plant"),
    _noun("tulip", "🌷", "", "flower, plant"),
    _noun("pumpkin", "🎃", "", "vegetable, food"),
    _noun("snowman", "⛄", "", "object"),
    _noun("gift", "🎁", "present", "object"),
    _noun("robot", "🤖", "", "toy, object"),
)
NOUNS = VOC_NOUNS + FURTHER_NOUNS
