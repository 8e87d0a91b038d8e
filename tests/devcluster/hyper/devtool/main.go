// Command devtool is the small change of a local cluster in one static binary of the standard library:
//
//	devtool init [-watch-fd N] [-tmpfs DIR]... [-bind SRC:DST]... [-pretend DST=TEXT]...   first process of a namespace (sandbox.py, nodes.py)
//	devtool relay -to HOST:PORT -listen-fd N                                             port forwarder across network namespaces (sandbox.py)
//	devtool pause                                                                        the sandbox container of every pod (images.py)
//	devtool serve|lookup|get|env|sleep|exit ...                                          what the probe image's containers run (the tests)
package main

import (
	"fmt"
	"os"
)

var commands = map[string]func([]string) error{
	"init": runInit, "relay": runRelay, "pause": runPause,
	"serve": runServe, "lookup": runLookup, "get": runGet, "env": runEnv, "sleep": runSleep, "exit": runExit,
}

func main() {
	if len(os.Args) < 2 || commands[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "usage: devtool init|relay|pause|serve|lookup|get|env|sleep|exit ...")
		os.Exit(2)
	}
	if err := commands[os.Args[1]](os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "devtool", os.Args[1]+":", err)
		os.Exit(1)
	}
}
