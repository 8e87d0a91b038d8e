package main

import (
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
)

// list collects a flag that may be given several times.
type list []string

func (l *list) String() string     { return strings.Join(*l, " ") }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

// runInit is process 1 of a PID namespace: it prepares the mount namespace, reports "ready" on standard output, reaps
// orphans and waits. When it ends, for whatever reason, the kernel kills every process of the namespace, and with the
// last of them go its mounts and network: that is what makes a cluster leave no trace.
//
// -watch-fd is the read end of a pipe whose write end the owner keeps: end of file means that the owner is dead.
func runInit(arguments []string) error {
	flags := flag.NewFlagSet("init", flag.ExitOnError)
	watch := flags.Int("watch-fd", -1, "end when this pipe's other end is closed")
	var tmpfs, bind, pretend list
	flags.Var(&tmpfs, "tmpfs", "directory to hide under an empty file system")
	flags.Var(&bind, "bind", "SOURCE:TARGET to mount; the target is created where it is missing")
	flags.Var(&pretend, "pretend", "TARGET=TEXT: let a file read as TEXT in here (a kernel setting that must not change outside)")
	_ = flags.Parse(arguments)

	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGCHLD, syscall.SIGTERM, syscall.SIGINT)
	if err := prepareMounts(tmpfs, bind, pretend); err != nil {
		return err
	}
	fmt.Println("ready")
	_ = os.Stdout.Close()

	ownerGone := make(chan struct{})
	if *watch >= 0 {
		go func() {
			_, _ = io.Copy(io.Discard, os.NewFile(uintptr(*watch), "owner"))
			close(ownerGone)
		}()
	}
	for {
		select {
		case <-ownerGone:
			return nil
		case received := <-signals:
			if received != syscall.SIGCHLD {
				return nil
			}
			reapChildren()
		}
	}
}

func prepareMounts(tmpfs, bind, pretend list) error {
	// unshare(1) already made propagation private, so that nothing mounted from here on is seen outside.
	if err := syscall.Mount("proc", "/proc", "proc", syscall.MS_NOSUID|syscall.MS_NODEV|syscall.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	for _, directory := range tmpfs {
		if err := syscall.Mount("tmpfs", directory, "tmpfs", 0, "mode=0755"); err != nil {
			return fmt.Errorf("mount a tmpfs on %s: %w", directory, err)
		}
	}
	for _, pair := range bind {
		source, target, _ := strings.Cut(pair, ":")
		if err := os.MkdirAll(target, 0o755); err != nil {
			return err
		}
		if err := syscall.Mount(source, target, "", syscall.MS_BIND|syscall.MS_REC, ""); err != nil {
			return fmt.Errorf("bind %s on %s: %w", source, target, err)
		}
	}
	for index, pair := range pretend {
		target, text, _ := strings.Cut(pair, "=")
		source := filepath.Join(tmpfs[0], fmt.Sprintf("pretend-%d", index))
		if err := os.WriteFile(source, []byte(text+"\n"), 0o644); err != nil {
			return err
		}
		if _, err := os.Stat(target); err != nil {
			continue // this kernel does not have the setting
		}
		if err := syscall.Mount(source, target, "", syscall.MS_BIND, ""); err != nil {
			return fmt.Errorf("bind %s on %s: %w", source, target, err)
		}
	}
	return nil
}

func reapChildren() {
	for {
		pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil)
		if pid <= 0 || err != nil {
			return
		}
	}
}

// runPause holds a pod's namespaces until it is told to stop.
func runPause([]string) error {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGCHLD, syscall.SIGTERM, syscall.SIGINT)
	for received := range signals {
		if received != syscall.SIGCHLD {
			return nil
		}
		reapChildren()
	}
	return nil
}
