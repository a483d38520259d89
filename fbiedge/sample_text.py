"""A few sentences to check a model on where nobody gives a text."""

SAMPLE_TEXT = (
    "Once upon a time there was a small town by the sea. Every morning the fishermen took their boats out, and every "
    "evening the children ran down to the harbour to see what they had caught. One winter the wind blew so hard that "
    "nobody could leave the shore for three weeks. The people shared what was in their kitchens, told each other old "
    "stories by the fire, and waited. When the sky cleared at last, the oldest of them said that it had been the best "
    "winter of her life."
)
