package main

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	device "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

const healthPoll = 200 * time.Millisecond

// gpuPlugin offers devices that do not exist. A device whose name stands in the file named by -unhealthy, one a line,
// is reported as Unhealthy while it stands there.
type gpuPlugin struct {
	device.UnimplementedDevicePluginServer
	registration.UnimplementedRegistrationServer
	resource  string
	socket    string
	unhealthy string
	names     []string
}

func (p *gpuPlugin) GetInfo(context.Context, *registration.InfoRequest) (*registration.PluginInfo, error) {
	return &registration.PluginInfo{
		Type: registration.DevicePlugin, Name: p.resource, Endpoint: p.socket, SupportedVersions: []string{device.Version},
	}, nil
}

func (p *gpuPlugin) NotifyRegistrationStatus(_ context.Context, status *registration.RegistrationStatus) (*registration.RegistrationStatusResponse, error) {
	fmt.Println("registered:", status.PluginRegistered, status.Error)
	return &registration.RegistrationStatusResponse{}, nil
}

func (p *gpuPlugin) GetDevicePluginOptions(context.Context, *device.Empty) (*device.DevicePluginOptions, error) {
	return &device.DevicePluginOptions{}, nil
}

func (p *gpuPlugin) ListAndWatch(_ *device.Empty, stream grpc.ServerStreamingServer[device.ListAndWatchResponse]) error {
	told := ""
	for {
		sick := p.sick()
		response := &device.ListAndWatchResponse{}
		var state strings.Builder
		for _, name := range p.names {
			health := device.Healthy
			if sick[name] {
				health = device.Unhealthy
			}
			response.Devices = append(response.Devices, &device.Device{ID: name, Health: health})
			state.WriteString(name + health)
		}
		if state.String() != told {
			if err := stream.Send(response); err != nil {
				return err
			}
			told = state.String()
		}
		select {
		case <-stream.Context().Done():
			return nil
		case <-time.After(healthPoll):
		}
	}
}

func (p *gpuPlugin) sick() map[string]bool {
	found := map[string]bool{}
	file, err := os.Open(p.unhealthy)
	if err != nil {
		return found
	}
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		found[strings.TrimSpace(lines.Text())] = true
	}
	return found
}

func (p *gpuPlugin) Allocate(_ context.Context, request *device.AllocateRequest) (*device.AllocateResponse, error) {
	response := &device.AllocateResponse{}
	for _, container := range request.ContainerRequests {
		response.ContainerResponses = append(response.ContainerResponses, &device.ContainerAllocateResponse{
			Envs: map[string]string{"NVIDIA_VISIBLE_DEVICES": strings.Join(container.DevicesIds, ",")},
		})
	}
	return response, nil
}

// runGPUPlugin registers through the kubelet's plugin watcher (<root>/plugins_registry). The older way, a call to
// /var/lib/kubelet/device-plugins/kubelet.sock, names one kubelet per machine.
func runGPUPlugin() {
	flags := flag.NewFlagSet("fake-gpu-plugin", flag.ExitOnError)
	registry := flags.String("registry", "", "the kubelet's plugins_registry directory")
	resource := flags.String("resource", "nvidia.com/gpu", "name of the extended resource")
	count := flags.Int("count", 1, "number of devices")
	unhealthy := flags.String("unhealthy", "", "file with the names of the devices that are to be unhealthy")
	_ = flags.Parse(os.Args[1:])

	plugin := &gpuPlugin{
		resource: *resource, unhealthy: *unhealthy,
		socket: filepath.Join(*registry, strings.ReplaceAll(*resource, "/", "-")+".sock"),
	}
	for index := range *count {
		plugin.names = append(plugin.names, fmt.Sprintf("GPU-%d", index))
	}
	_ = os.Remove(plugin.socket)
	listener, err := net.Listen("unix", plugin.socket)
	if err == nil {
		server := grpc.NewServer()
		registration.RegisterRegistrationServer(server, plugin)
		device.RegisterDevicePluginServer(server, plugin)
		err = server.Serve(listener)
	}
	fmt.Fprintln(os.Stderr, "fake-gpu-plugin:", err)
	os.Exit(1)
}
