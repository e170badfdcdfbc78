"""A bot without a framework: HTTP, one update after the other. WORK: seconds for each."""

import json
import os
import signal
import sys
import time
import urllib.request

base = os.environ.get("BOTLEASE_API_URL") or os.environ["TELEGRAM_API_URL"]
token, work = os.environ["TELEGRAM_BOT_TOKEN"], float(os.environ.get("WORK", "0"))


def call(method, **args):
    request = urllib.request.Request(
        f"{base}/bot{token}/{method}", json.dumps(args).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["result"]


if "--die" in sys.argv:
    sys.exit(3)
if "--gate" in sys.argv:
    import botlease

    call("getMe")
    botlease.wait_at_gate()
signal.signal(signal.SIGUSR1, lambda *_: print("bot: USR1", flush=True))
offset = 0
print("bot: starting", flush=True)
while True:
    for update in call("getUpdates", offset=offset, timeout=20):
        message = update["message"]
        print("bot: has", message["text"], flush=True)
        time.sleep(work)
        if message["text"] == "die":
            os._exit(9)
        call(
            "sendMessage",
            chat_id=message["chat"]["id"],
            text=f"term {os.environ.get('BOTLEASE_TERM')}",
            reply_parameters={"message_id": message["message_id"]},
        )
        offset = update["update_id"] + 1
