# Sets up diffalign in ./.venv and activates it:   . train_scripts/setup.sh
# Needs Python >= 3.11 and git. Does nothing but activate when pyproject.toml is as at the last set-up.
# Written to be sourced by any POSIX shell from the root of the checkout.

diffalign_setup() {
    [ -f pyproject.toml ] || { echo "setup: run this from the root of the checkout" >&2; return 1; }
    diffalign_key=$(cksum < pyproject.toml)
    if [ ! -x .venv/bin/python ] || [ "$(cat .venv/diffalign-key 2>/dev/null)" != "$diffalign_key" ]; then
        "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            { echo "setup: Python 3.11 or newer is needed; name one with PYTHON=..." >&2; return 1; }
        "${PYTHON:-python3}" -m venv .venv || return 1
        # Without a GPU the CPU build of torch saves gigabytes; where none is offered the ordinary one is taken. It is named
        # together with the rest, or the newest torchvision would pull in a newest torch.
        diffalign_torch="torch"
        command -v nvidia-smi >/dev/null 2>&1 || diffalign_torch="torch==2.13.0"
        .venv/bin/python -m pip install --quiet "$diffalign_torch" --editable ".[dev]" || return 1
        # A torchvision built for CUDA does not load beside a CPU torch, and transformers and accelerate would fail with it
        # or, through timm, without it. Both are wanted by open_clip alone, which then cannot be used.
        .venv/bin/python -c 'import torchvision' >/dev/null 2>&1 ||
            .venv/bin/python -m pip uninstall --quiet --yes torchvision timm || return 1
        echo "$diffalign_key" > .venv/diffalign-key
    fi
    . .venv/bin/activate
}
diffalign_setup
