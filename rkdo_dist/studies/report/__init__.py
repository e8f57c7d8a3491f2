"""`rkdo report`: run directories as one self-contained page.

groups     runs grouped by configuration apart from the seed, and the first table (which `rkdo compare` prints)
words      paired comparisons, and sentences on what a loss gap consists of
charts     curves with seed bands, and what it took to reach an accuracy
pictures   from the newest checkpoint: embedding map, nearest neighbours, field heat maps
page       the page
"""
