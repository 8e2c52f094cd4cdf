"""What a user's script on one machine of a cluster does: runs, one after the other.

Standard input has one JSON object a line, the arguments of fedmom.run.
After each it prints a line: the status, and what is to be said of it.
"""

import json
import sys

import fedmom

if __name__ == "__main__":
    for line in sys.stdin:
        try:
            result = fedmom.run(**json.loads(line))
            print(json.dumps([result.status, result.message]), flush=True)
        except fedmom.InputError as error:
            print(json.dumps(["refused", str(error)]), flush=True)
