#!/bin/sh
# What a spot instance runs when it boots: go on from where the one before it got to, until the training is done.
#
#   REPOSITORY=https://github.com/you/project ./job.sh --max-iters 10000 --save-every 100
#
# The repository has .castore/ with a remote called bucket and push = "auto"; credentials are in the environment.
set -eu
git clone --quiet "$REPOSITORY" project
cd project
castore fetch --from bucket latest || [ $? -eq 3 ]  # 3: nothing was pushed yet
exec castore train --resume latest "$@"             # exec: so that SIGTERM reaches it, which saves and pushes
