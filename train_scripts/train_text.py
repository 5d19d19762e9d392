"""Align a language model: ``accelerate launch train_scripts/train_text.py --method simpo``.

``--help`` lists the methods, ``--method NAME --help`` the options of one, ``--print_config`` what a run would use.
"""

from diffalign.cli.main import script

if __name__ == "__main__":
    script(modality="text", prog="train_text.py")
