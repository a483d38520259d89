"""Texts to check a model on, and to fit it to, where nobody gives one. They share no sentence: what is fitted to one is
measured on the other."""

SAMPLE_TEXT = (
    "Once upon a time there was a small town by the sea. Every morning the fishermen took their boats out, and every "
    "evening the children ran down to the harbour to see what they had caught. One winter the wind blew so hard that "
    "nobody could leave the shore for three weeks. The people shared what was in their kitchens, told each other old "
    "stories by the fire, and waited. When the sky cleared at last, the oldest of them said that it had been the best "
    "winter of her life."
)

CALIBRATION_TEXT = (
    "Tim had a red kite. He took it to the top of the hill behind his house, where the grass was short and the air was "
    'never still. "Hold it high," said his sister, "and let go when I say so!" The kite went up, turned twice, and fell '
    "into a tree. Tim wanted to cry, but a big boy with a ladder came by and helped them. They thanked him and gave him "
    "half of their cake. From then on the three of them met on the hill whenever there was wind.\n\n"
    "Bread needs only four things: flour, water, salt and time. Mix them in a bowl until no dry flour is left, cover the "
    "bowl, and leave it alone overnight. In the morning the dough has doubled and is full of bubbles. Fold it a few times, "
    "shape it into a ball, and bake it in a very hot oven for 45 minutes. If it sounds hollow when you knock on the "
    "bottom, it is done.\n\n"
    "A river carries more than water. In spring, when the snow of the mountains melts, it moves sand and stones for "
    "hundreds of kilometres; where it slows down, it drops them, first the heavy ones, then the light ones. Over "
    "thousands of years this has built the flat land on which most of our cities stand. Engineers who straighten a river "
    "learn that it remembers its old bed, and that it comes back.\n\n"
    '"What do you think?" asked the doctor. "Will she walk again?" The nurse looked at the picture for a long while '
    "before she answered. \"Yes, but not before the summer. The bone is whole, the muscles aren't. She has to begin with a "
    'few steps each day, and she has to be patient with herself, which is harder."\n\n'
    "In 1913 a company in Detroit began to build cars on a moving line. A car that had taken twelve hours was finished in "
    "less than two, and its price fell from year to year. Workers were paid twice as much as elsewhere, yet many left "
    "after a few months, because doing the same thing all day is tiring in a way that money does not make good.\n\n"
    "Lily could not sleep. She heard the clock in the hall, and a dog far away, and something small that ran behind the "
    'wall. "Are you a mouse?" she whispered. Nobody said a word. So she put a piece of cheese on the floor, closed her eyes '
    "and counted to one hundred. When she looked again the cheese was gone, and next to the plate lay a shiny button. Lily "
    "laughed. The next night she put out two pieces.\n\n"
    "To find out which of two methods is better, try both on data that neither of them has seen. A method that was tuned "
    "on the very examples it is judged by looks better than it is; the difference grows as the examples become fewer. "
    "This sounds obvious, but it is forgotten often enough to fill journals."
)
