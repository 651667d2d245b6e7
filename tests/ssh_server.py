"""An SSH server for one user with one key: ``ssh_server.py ADDRESS PORT HOST_KEY CLIENT_KEY [FROM TO]``.

It runs commands as this user, on the loopback interface. FROM and TO replace one path by another one in them,
as on a machine that has a folder of its own at that place.
"""

import asyncio
import contextlib
import sys

import asyncssh

ADDRESS, PORT, HOST_KEY, CLIENT_KEY, *REPLACED = sys.argv[1:]


class OneUser(asyncssh.SSHServer):
    def begin_auth(self, username):
        return True


async def carry(source, sink):
    while said := await source.read(4096):
        sink.write(said)
        await sink.drain()


async def feed(source, sink):
    with contextlib.suppress(OSError, asyncssh.Error):  # a command may end before it has read all
        await carry(source, sink)
    sink.close()


async def handle(process):
    command = process.command or ""
    if REPLACED:
        command = command.replace(*REPLACED)
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec("bash", "-c", command, stdin=pipe, stdout=pipe, stderr=pipe)
    feeding = asyncio.create_task(feed(process.stdin, child.stdin))
    await asyncio.gather(carry(child.stdout, process.stdout), carry(child.stderr, process.stderr))
    process.exit(await child.wait())
    feeding.cancel()


async def main():
    await asyncssh.create_server(
        OneUser, ADDRESS, int(PORT), server_host_keys=[HOST_KEY], authorized_client_keys=f"{CLIENT_KEY}.pub",
        process_factory=handle, encoding=None,
    )  # fmt: skip
    print("listening", flush=True)
    await asyncio.Event().wait()


asyncio.run(main())
