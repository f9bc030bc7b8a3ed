"""Words that needles are made of. None of NOUNS is part of another, nor is any of ADJECTIVES."""

from __future__ import annotations

NOUNS = (
    "anchor apricot badger barley basket beacon blanket button cabbage camel candle canyon carpet "
    "castle cedar cherry cobbler copper cotton crystal dagger daisy dolphin donkey dragon engine "
    "falcon feather fiddle flannel forest fossil furnace garlic ginger glacier goblet granite hammer "
    "harbour hazel helmet honey island ivory jacket jungle kettle kitten ladder lantern lemon lizard "
    "magnet marble meadow mirror monkey mustard needle nettle nutmeg oyster paddle panther parsley "
    "pebble pepper pigeon pillow planet pumpkin rabbit raven ribbon saddle salmon scarlet shovel "
    "silver sparrow spider squirrel tiger timber tulip turnip tunnel turtle velvet violin walnut "
    "weasel willow wizard zebra"
).split()  # fmt: skip
ADJECTIVES = (
    "ancient angry bitter blunt brave brief bright broad busy calm cheap clever clumsy crisp curious "
    "daring dusty eager early empty faint famous fancy fierce foggy fresh frosty gentle giant glad "
    "golden grumpy hasty heavy hollow honest humble hungry idle jolly keen lazy lively lonely loud "
    "lucky mellow merry mild misty modest muddy narrow noble odd patient plain polite proud purple "
    "quick quiet rapid rare rough royal rusty salty secret shallow sharp shiny silent simple sleepy "
    "slender smooth snowy solid spicy steady sticky stormy strange sturdy sudden sunny sweet swift "
    "tender thirsty tiny tough upbeat useful vivid warm wicked wild wooden yellow young"
).split()  # fmt: skip
