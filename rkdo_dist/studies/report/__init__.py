"""`rkdo report`: run directories as one self-contained page.

runs       what the run directories hold, grouped by configuration apart from the seed
words      sentences and comparisons: what a loss gap consists of, what the seeds say
charts     curves with seed bands, and what it took to reach an accuracy
pictures   from the newest checkpoint: embedding map, nearest neighbours, field heat maps
html       elements that escape everything
page       the page
"""
