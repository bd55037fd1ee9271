"""The curated taxonomy: YAML facts about objects, kinds, risks and sentences, and the models that check them."""
