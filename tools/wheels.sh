#!/bin/sh
# Collect the wheels that a GPU machine without network lacks, for its Python (Linux, x86-64):
#
#     tools/wheels.sh [FOLDER] [PYTHON_VERSION]      # default: runs/wheels 3.12
#
# On that machine:  python3 -m pip install --no-index --no-deps FOLDER/*.whl
#
# It is expected to have torch, torchvision, numpy, einops, safetensors, accelerate, scikit-image,
# matplotlib and tensorboard; wheels of these, and of what they need, are left out.
set -eu
folder=${1:-runs/wheels}
version=${2:-3.12}
python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)

download() {
    "$python" -m pip download --quiet --dest "$folder" --only-binary=:all: --implementation cp \
        --python-version "$version" --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 --platform manylinux1_x86_64 --platform any "$@"
}

mkdir -p "$folder"
download --no-deps constriction lpips   # they need torch, numpy and scipy only
download papermill ipykernel ipywidgets anywidget
for name in numpy scipy torch pillow matplotlib pyyaml packaging typing_extensions \
    debugpy widgetsnbextension jupyterlab_widgets; do  # the last three serve a debugger and a browser
    rm -f "$folder/$name"-*.whl
done
ls "$folder"
du -sh "$folder"
