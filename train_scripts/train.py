"""Align a text-to-image model: ``accelerate launch train_scripts/train.py --method inpo``.

``--help`` lists the methods, ``--method NAME --help`` the options of one, ``--print_config`` what a run would use.
"""

from diffalign.cli.main import script

if __name__ == "__main__":
    script(modality="image", prog="train.py")
