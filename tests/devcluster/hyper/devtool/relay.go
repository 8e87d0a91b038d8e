package main

import (
	"flag"
	"io"
	"net"
	"os"
	"sync"
)

// runRelay copies TCP connections. A socket belongs to the network namespace in which it was made, so a listener made
// by the driver on the machine's loopback and inherited here accepts out there, while this process dials in here: no
// address translation, no route and no unix socket joins the two networks.
func runRelay(arguments []string) error {
	flags := flag.NewFlagSet("relay", flag.ExitOnError)
	target := flags.String("to", "", "HOST:PORT to dial in this network namespace")
	descriptor := flags.Uint("listen-fd", 0, "inherited listening socket")
	_ = flags.Parse(arguments)
	listener, err := net.FileListener(os.NewFile(uintptr(*descriptor), "listener"))
	if err != nil {
		return err
	}
	for {
		outside, err := listener.Accept()
		if err != nil {
			return err
		}
		go relay(outside.(*net.TCPConn), *target)
	}
}

func relay(outside *net.TCPConn, target string) {
	defer outside.Close()
	dialed, err := net.Dial("tcp", target)
	if err != nil {
		return
	}
	inside := dialed.(*net.TCPConn)
	defer inside.Close()
	var both sync.WaitGroup
	for _, way := range [][2]*net.TCPConn{{outside, inside}, {inside, outside}} {
		both.Add(1)
		go func() {
			defer both.Done()
			_, _ = io.Copy(way[1], way[0])
			_ = way[1].CloseWrite()
		}()
	}
	both.Wait()
}
