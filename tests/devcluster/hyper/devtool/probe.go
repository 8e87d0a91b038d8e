package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const probeTimeout = 5 * time.Second

// runServe answers every HTTP request with this host's name, and says on standard output that it listens.
func runServe(arguments []string) error {
	address := ":8080"
	if len(arguments) > 0 {
		address = arguments[0]
	}
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	fmt.Println("serving", host, "on", address)
	http.HandleFunc("/", func(writer http.ResponseWriter, _ *http.Request) { _, _ = fmt.Fprintln(writer, host) })
	server := &http.Server{ReadHeaderTimeout: probeTimeout}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	go func() { <-stop; _ = server.Close() }()
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// runLookup prints the IPv4 addresses of a name, separated by blanks, as the pod's own resolver finds them.
func runLookup(arguments []string) error {
	if len(arguments) != 1 {
		return errors.New("usage: lookup NAME")
	}
	ctx, cancel := context.WithTimeout(context.Background(), probeTimeout)
	defer cancel()
	addresses, err := net.DefaultResolver.LookupHost(ctx, arguments[0])
	if err != nil {
		return err
	}
	fmt.Println(strings.Join(addresses, " "))
	return nil
}

// runGet prints the body of an HTTP answer.
func runGet(arguments []string) error {
	if len(arguments) != 1 {
		return errors.New("usage: get URL")
	}
	client := &http.Client{Timeout: probeTimeout}
	response, err := client.Get(arguments[0])
	if err != nil {
		return err
	}
	defer response.Body.Close()
	_, err = io.Copy(os.Stdout, response.Body)
	return err
}

// runEnv prints the value of an environment variable.
func runEnv(arguments []string) error {
	for _, name := range arguments {
		fmt.Println(os.Getenv(name))
	}
	return nil
}

// runSleep waits for a number of seconds, or for ever, and obeys SIGTERM at once.
func runSleep(arguments []string) error {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	var limit <-chan time.Time
	if len(arguments) > 0 {
		seconds, err := strconv.ParseFloat(arguments[0], 64)
		if err != nil {
			return err
		}
		limit = time.After(time.Duration(seconds * float64(time.Second)))
	}
	select {
	case <-stop:
	case <-limit:
	}
	return nil
}

// runExit ends with the given status: `exit 3`, and leaves an optional second argument as the termination message.
func runExit(arguments []string) error {
	if len(arguments) == 0 {
		return errors.New("usage: exit CODE [TERMINATION-MESSAGE]")
	}
	code, err := strconv.Atoi(arguments[0])
	if err != nil {
		return err
	}
	if len(arguments) > 1 {
		if err := os.WriteFile("/dev/termination-log", []byte(arguments[1]), 0o644); err != nil {
			return err
		}
	}
	os.Exit(code)
	return nil
}
