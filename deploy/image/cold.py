"""An app's process that starts from nothing, with the changes that the warm one has."""

import sys

import links
import warm

if __name__ == "__main__":
    links.mend(links.RETRIES, links.ENDS)
    sys.path[0] = ""
    warm.run(sys.argv[1:])
