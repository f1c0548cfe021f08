#!/bin/sh
# Make one virtual environment per peer under FOLDER, with pinned versions; one that is there is left as it is.
#
#     sh benchmarks/peers/environments.sh FOLDER [llm-compressor] [gptqmodel] [auto-round]
set -eu
folder=$1
shift
[ $# -gt 0 ] || set -- llm-compressor gptqmodel auto-round
torch="torch>=2.13,<2.14"

for peer; do
    [ -e "$folder/$peer/ready" ] && continue
    python3 -m venv --clear "$folder/$peer"
    pip="$folder/$peer/bin/pip --no-cache-dir --disable-pip-version-check -q"
    case $peer in
    llm-compressor) $pip install "$torch" "llmcompressor==0.14.*" "transformers<=5.17" pillow ;;
    gptqmodel)
        # It asks for a torch that is newer than its CPU path needs, so its dependencies are named here.
        $pip install "$torch" "transformers>=5.20.2" accelerate datasets safetensors threadpoolctl device-smi protobuf \
            requests pypcre tokenicer logbar ninja torchao defuser pillow setuptools
        $pip install --no-deps "gptqmodel==7.7.*"
        # Its packer is compiled where it is first used; now, so that no measurement has it in it.
        "$folder/$peer/bin/python" -c "from gptqmodel import extension; extension.load('pack_block_cpu')"
        ;;
    auto-round) $pip install "$torch" "auto-round==0.16.*" pillow ;;
    esac
    touch "$folder/$peer/ready"
done
