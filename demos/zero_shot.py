"""Classify the pictures of a folder among your own labels, in a dozen lines.

python demos/zero_shot.py FOLDER "cat,dog,pizza" [MODEL]
"""

import sys
from pathlib import Path

import mm

if len(sys.argv) < 3:
    sys.exit(__doc__)
folder, labels = Path(sys.argv[1]), [label.strip() for label in sys.argv[2].split(",")]
model = mm.load(sys.argv[3] if len(sys.argv) > 3 else "emoji-clip")
for prediction in mm.classify(model, [folder], labels):
    print(f"{prediction.probabilities[0]:6.1%}  {prediction.labels[0]:20}  {prediction.image}")
