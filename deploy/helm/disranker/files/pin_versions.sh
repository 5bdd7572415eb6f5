# Puts the pinned versions, and nothing else, into the repository that Triton reads. Every published version brings its
# own config.pbtxt, so what is promoted in the shared repository meanwhile changes nothing for this pod.
set -eu
for pinned in $PINNED; do
  arm=${pinned%%=*}
  version=${pinned##*=}
  first="${arm}_first_encoder"  # of a cascade alone
  [ -d "$PUBLISHED/$first/$version" ] || first=
  for model in "$arm" "${arm}_encoder" $first; do
    source="$PUBLISHED/$model/$version"
    if [ ! -f "$source/config.pbtxt" ]; then
      echo "$source: no such published version; python build/releases.py --name $arm lists them" >&2
      exit 1
    fi
    mkdir -p "$MODELS/$model"
    cp "$source/config.pbtxt" "$MODELS/$model/config.pbtxt"
    ln -sfn "$source" "$MODELS/$model/$version"
  done
done
