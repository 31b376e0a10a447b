"""How a run gets to the Hub: which files are published, made fit for it, and the page that describes them.

The room alone knows what names this machine and must not leave it.
"""

from reward_recipes.push.scrub import Scrubber
from reward_recipes.push.upload import check_push, push_run
