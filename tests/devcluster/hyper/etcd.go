package main

import (
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
)

// runEtcd is a single-member etcd on the default ports (2379, 2380) of its network namespace.
func runEtcd() {
	flags := flag.NewFlagSet("etcd", flag.ExitOnError)
	dataDir := flags.String("data-dir", "", "directory of the member's data")
	unsafeNoFsync := flags.Bool("unsafe-no-fsync", false, "do not wait for the disk: a throw-away cluster needs no durability")
	_ = flags.Parse(os.Args[1:])

	config := embed.NewConfig()
	config.Dir = *dataDir
	config.UnsafeNoFsync = *unsafeNoFsync
	config.LogLevel = "warn"
	server, err := embed.StartEtcd(config)
	if err != nil {
		fmt.Fprintln(os.Stderr, "etcd:", err)
		os.Exit(1)
	}
	defer server.Close()
	select {
	case <-server.Server.ReadyNotify():
	case <-time.After(30 * time.Second):
		fmt.Fprintln(os.Stderr, "etcd: not ready within 30 s")
		os.Exit(1)
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	select {
	case <-stop:
	case <-server.Server.StopNotify():
	}
}
