"""One endpoint of the real commlib-py on Redis, driven by `tests/python.rs`.

    peer.py PORT sub TOPIC        every message:  {"data": …}
    peer.py PORT psub PATTERN     every message:  {"data": …, "topic": …}
    peer.py PORT pub              reads {"topic": …, "data": …} lines and publishes them
    peer.py PORT service NAME     every request:  {"request": …}; answers {"c": a + b}, raises if "fail" is true
    peer.py PORT client NAME      reads request lines; every answer {"reply": …} or {"timeout": true}

Prints `ready` alone on a line once it is connected, then one JSON object per line. It ends when its standard input does,
so it never outlives the test.
"""

import json
import os
import sys

# commlib-py logs to standard output. That is ours: what it prints goes to standard error.
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

from commlib.exceptions import RPCClientTimeoutError  # noqa: E402
from commlib.msg import PubSubMessage, RPCMessage  # noqa: E402
from commlib.transports import redis  # noqa: E402

# A service of commlib-py shares one response object between its threads and may send the answer of one request to the
# caller of another. Threads that only switch when they block hide that, which is not what is tested here.
sys.setswitchinterval(10)


def say(line):
    print(line if isinstance(line, str) else json.dumps(line), file=answers, flush=True)


class Add(RPCMessage):
    class Request(RPCMessage.Request):
        a: int = 0
        b: int = 0
        fail: bool = False

    class Response(RPCMessage.Response):
        c: int = 0


class Any(PubSubMessage, extra="allow"):
    """A message of whatever fields it is given."""


def on_request(request):
    say({"request": request.model_dump()})
    if request.fail:
        raise ValueError("told to fail")
    return Add.Response(c=request.a + request.b)


def main():
    port, role, *rest = sys.argv[1:]
    params = redis.ConnectionParameters(host="127.0.0.1", port=int(port))
    common = {"conn_params": params}
    if role == "sub":
        endpoint = redis.Subscriber(
            topic=rest[0], on_message=lambda data: say({"data": data}), **common
        )
    elif role == "psub":
        endpoint = redis.PSubscriber(
            topic=rest[0],
            on_message=lambda data, topic: say({"data": data, "topic": topic}),
            **common,
        )
    elif role == "service":
        endpoint = redis.RPCService(
            rpc_name=rest[0], msg_type=Add, on_request=on_request, **common
        )
    elif role == "pub":
        endpoint = redis.MPublisher(**common)
    else:
        endpoint = redis.RPCClient(rpc_name=rest[0], msg_type=Add, **common)
    endpoint.run()
    say("ready")
    for line in sys.stdin:
        line = json.loads(line)
        if role == "pub":
            endpoint.publish(Any(**line["data"]), line["topic"])
        elif role == "client":
            within = line.pop("within", 10)
            try:
                reply = endpoint.call(Add.Request(**line), timeout=within)
                say({"timeout": True} if reply is None else {"reply": reply.model_dump()})
            except RPCClientTimeoutError:
                say({"timeout": True})


if __name__ == "__main__":
    main()
