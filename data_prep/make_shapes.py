"""Generates the procedural set of coloured shapes as image-text pairs.

python data_prep/make_shapes.py --config configs/quickstart/shapes.yaml
"""

from lavit_dist.config.command_line import run_entry_point
from lavit_dist.config.make_shapes import MakeShapesConfig
from pipelines.make_shapes import make_shapes

if __name__ == "__main__":
    run_entry_point(MakeShapesConfig, make_shapes, "Generates scenes of coloured shapes with captions that can be checked exactly.")
